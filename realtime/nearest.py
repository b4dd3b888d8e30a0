"""Which recordings are like this one: the recordings of a folder by their embeddings, in an index kept on disk.

The index is faiss's flat one: exact, without anything to tune, and recordings leave it as easily as they come. At a
hundred thousand recordings a question takes some milliseconds; approximate graphs pay beyond that.
"""

from __future__ import annotations

import hashlib
import json
import logging
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from realtime.audio import AudioFileError
from realtime.files import NewFile
from realtime.recognise import RecogniseError, Recogniser, file_sha256, find_recordings, recognise_file

logger = logging.getLogger(__name__)

INDEX_VERSION = 1


@dataclass(frozen=True)
class Neighbour:
    """A recording that is near: its name below the library's folder, and the cosine of its embedding's angle."""

    name: str
    similarity: float


def _id(sha256: str) -> int:
    """What faiss calls a recording; 63 bits of its hash are as good as all."""
    return int(sha256[:16], 16) >> 1


class EmbeddingIndex:
    """Embeddings of length 1 by the content of their recordings. One thread at a time."""

    def __init__(self, embedding_dim: int) -> None:
        self._index: Any = faiss.IndexIDMap2(faiss.IndexFlatIP(embedding_dim))
        self._keys: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, sha256: str) -> bool:
        return _id(sha256) in self._keys

    @property
    def keys(self) -> frozenset[str]:
        """The hashes of all recordings in it."""
        return frozenset(self._keys.values())

    def add(self, keys: Sequence[str], embeddings: NDArray[np.float32]) -> None:
        """Recordings that are not in it yet, by hash, with their embeddings [count, E]."""
        ids = np.array([_id(key) for key in keys], dtype=np.int64)
        self._index.add_with_ids(np.ascontiguousarray(embeddings, dtype=np.float32), ids)
        self._keys.update(zip(ids.tolist(), keys, strict=True))

    def remove(self, keys: Sequence[str]) -> None:
        """Forget recordings that are in it."""
        ids = np.array([_id(key) for key in keys], dtype=np.int64)
        self._index.remove_ids(ids)
        for number in ids.tolist():
            del self._keys[number]

    def nearest(self, embedding: NDArray[np.float32], count: int) -> list[tuple[str, float]]:
        """Hashes of the recordings nearest to an embedding [E] of length 1, with the cosine of the angle between."""
        if not len(self):
            return []
        similarities, ids = self._index.search(np.ascontiguousarray(embedding[None], np.float32), min(count, len(self)))
        return [(self._keys[i], float(s)) for i, s in zip(ids[0].tolist(), similarities[0], strict=True)]

    def save(self, path: Path, files: dict[str, list[Any]]) -> None:
        """Write it, with what is known of ``files``, whole or not at all. Raises OSError."""
        about = json.dumps({"version": INDEX_VERSION, "keys": list(self._keys.values()), "files": files})
        with NewFile(path) as part, part.open("wb") as file:
            np.savez(
                file, index=faiss.serialize_index(self._index), about=np.frombuffer(about.encode(), dtype=np.uint8)
            )

    @classmethod
    def load(cls, path: Path, embedding_dim: int) -> tuple[EmbeddingIndex, dict[str, list[Any]]]:
        """What ``save`` wrote; an empty index and no files where there is nothing that can be used."""
        loaded = cls(embedding_dim)
        try:
            # The archive checks its sums before faiss sees a byte.
            with np.load(path, allow_pickle=False) as stored:
                about = json.loads(stored["about"].tobytes())
                if about["version"] != INDEX_VERSION:
                    return loaded, {}
                index = faiss.deserialize_index(stored["index"])
                keys = {_id(key): str(key) for key in about["keys"]}
                files = dict(about["files"])
        except (OSError, ValueError, KeyError, TypeError, EOFError, RuntimeError, zipfile.BadZipFile) as error:
            logger.debug("no usable index at %s: %s", path, error)
            return loaded, {}
        if index.d != embedding_dim or index.ntotal != len(keys):
            return loaded, {}
        loaded._index, loaded._keys = index, keys
        return loaded, files


class RecordingLibrary:
    """A folder of recordings that can be asked which of them are near. One thread at a time."""

    def __init__(self, folder: Path, recogniser: Recogniser, cache: Path) -> None:
        """Raises RecogniseError where there is no such folder, or no room for the index."""
        if not folder.is_dir():
            raise RecogniseError(f"{folder}: there is no such folder; --nearest wants a folder of recordings")
        self.folder, self._recogniser = folder, recogniser
        # Embeddings of another model mean nothing here.
        place = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
        self.path = cache / f"nearest-{recogniser.manifest.fingerprint}-{place}.npz"
        try:
            cache.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RecogniseError(f"{cache}: cannot be made ({error.strerror}); choose another --cache") from None
        self.index, self._files = EmbeddingIndex.load(self.path, recogniser.manifest.style_dim)

    def update(self, progress: Callable[[int, int], None] | None = None) -> list[str]:
        """Hear recordings that are new, forget those that are gone; why some could not be heard.

        ``progress`` is told (new recordings heard, in all). Raises RecogniseError where the index cannot be written.
        """
        files: dict[str, list[Any]] = {}
        failed: list[str] = []
        for path in find_recordings(self.folder):
            name, status = path.relative_to(self.folder).as_posix(), path.stat()
            known = self._files.get(name)
            if known is None or known[:2] != [status.st_size, status.st_mtime_ns]:
                try:
                    known = [status.st_size, status.st_mtime_ns, file_sha256(path)]
                except AudioFileError as error:
                    failed.append(str(error))
                    continue
            files[name] = known
        wanted = {entry[2]: name for name, entry in files.items()}
        gone = [key for key in self.index.keys if key not in wanted]
        if gone:
            self.index.remove(gone)
        new = [(key, name) for key, name in wanted.items() if key not in self.index]
        for number, (key, name) in enumerate(new):
            try:
                heard = recognise_file(self._recogniser, self.folder / name)
                self.index.add([key], heard.embedding[None])
            except (AudioFileError, RecogniseError) as error:
                failed.append(str(error))
            if progress:
                progress(number + 1, len(new))
        if files != self._files or new or gone:
            self._files = files
            try:
                self.index.save(self.path, files)
            except OSError as error:
                raise RecogniseError(
                    f"{self.path}: cannot be written ({error.strerror}); choose another --cache"
                ) from None
        return failed

    def nearest(self, embedding: NDArray[np.float32], count: int, without: str = "") -> list[Neighbour]:
        """The recordings nearest to an embedding [E] of length 1, but for the one of this hash; ``update`` first."""
        names: dict[str, str] = {}
        for name, entry in self._files.items():
            names.setdefault(entry[2], name)
        found = self.index.nearest(embedding, count + 1)
        return [Neighbour(names[key], similarity) for key, similarity in found if key != without][:count]
