"""What a run started from: each weight file that it loaded, by what it is and by its SHA-256."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from cogvideox.weights import provenance
from cogvideox.weights.files import hub
from cogvideox.weights.files.locate import COMPONENTS, locate
from cogvideox.weights.identify import identify


class Sources:
    """``records()`` -> {name: {"path", "variant", "sha256"}}, or {"path", "error"} for files that cannot be found.

    Whole files are hashed, as the hubs do that publish them: two fine-tunes of one model have the same header. For 20
    GB that takes a minute, so a thread does it beside the first steps, and ``cache`` (a JSON file in the run folder)
    keeps the result for the next start, as long as sizes and time stamps of the files stay.
    """

    def __init__(
        self,
        paths: Mapping[str, str | Path],
        cache: Path,
        digest: Callable[[Iterable[Path]], str] | None = None,
    ):
        """paths: "transformer", "vae", "text_encoder", or any name for a LoRA -> what the section ``load`` says.
        digest: None is ``provenance.sha256``; one that remembers files of earlier runs reads fewer.

        The files are found now: the ``latest`` of a run that is still training moves.
        """
        self._cache, self._digest = cache, digest or provenance.sha256
        self._files: dict[str, list[Path]] = {}
        self._records: dict[str, dict[str, Any]] = {name: {"path": str(path)} for name, path in paths.items()}
        self._thread = threading.Thread(target=self._hash, daemon=True)
        for name, path in paths.items():
            component = name if name in COMPONENTS else "transformer"
            try:
                local = hub.resolve(path, component)
                self._records[name]["variant"] = identify(local, component).variant
                source = locate(local, component)
                self._files[name] = [*source.files, *source.ema_files]
            except (ValueError, OSError) as error:
                self._records[name]["error"] = str(error)

    def start(self) -> None:
        """Begin to hash; the folder of ``cache`` exists by now."""
        self._thread.start()

    def records(self) -> dict[str, dict[str, Any]]:
        """Waits until all files are hashed."""
        self._thread.join()
        return self._records

    def _hash(self) -> None:
        try:
            known = json.loads(self._cache.read_text())
        except (OSError, ValueError):
            known = {}
        for name, files in self._files.items():
            try:
                state = [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
                if known.get(name, {}).get("files") != state:
                    known[name] = {"files": state, "sha256": self._digest(files)}
                self._records[name]["sha256"] = known[name]["sha256"]
            except OSError as error:
                self._records[name]["error"] = str(error)
        if self._files:
            partial = self._cache.with_suffix(".tmp")
            partial.write_text(json.dumps(known, indent=1))
            os.replace(partial, self._cache)
