"""What of the registry outlives the process: loads, unloads, aliases and pins, in one JSON file of the state directory.

A state is written whole, to a new file that takes the old one's place, and it is on the disk before the operation that made it is
acknowledged: after a kill at any instant the file is the state before or the state after. One process at a time owns the directory.
Knows no engine and no HTTP; its caller decides what a state means.
"""

import fcntl
import json
import logging
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from moa_serve.adapter.checkpoint import replace_file
from moa_serve.adapter.importers import Signature
from moa_serve.errors import InvalidRequest, RegistryWriteFailed

logger = logging.getLogger(__name__)

FORMAT = "moa-state/1"
MAX_BYTES = 64 * 2**20
_FILE, _LOCK = "registry.json", "lock"
_REVISION = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Registered:
    """An adapter that an operator loaded.

    Args:
        path: its folder, relative to the adapters directory.
        variant: as it was loaded; None where its files tell.
        revision: its content when it was loaded: other content needs an operator again.
    """

    path: str
    variant: str | None
    revision: str


@dataclass(frozen=True, slots=True)
class RegistryState:
    """
    Args:
        adapters: by name.
        hidden: names that an operator unloaded, and their files as they were then: they stay unserved until the files change.
        aliases: by alias the weights of its targets, which are names, or names with a revision behind an `@`.
        pins: names whose adapters stay in memory.
    """

    adapters: Mapping[str, Registered] = field(default_factory=dict)
    hidden: Mapping[str, Signature] = field(default_factory=dict)
    aliases: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    pins: frozenset[str] = frozenset()

    def loaded(self, name: str, adapter: Registered) -> Self:
        return replace(self, adapters={**self.adapters, name: adapter}, hidden=_without(self.hidden, name))

    def unloaded(self, name: str, signature: Signature | None) -> Self:
        hidden = _without(self.hidden, name) if signature is None else {**self.hidden, name: signature}
        return replace(self, adapters=_without(self.adapters, name), hidden=hidden, pins=self.pins - {name})

    def aliased(self, alias: str, targets: Mapping[str, int] | None) -> Self:
        """`targets` None removes the alias."""
        return replace(self, aliases=_without(self.aliases, alias) if targets is None else {**self.aliases, alias: dict(targets)})

    def pinned(self, name: str, is_pinned: bool) -> Self:
        return replace(self, pins=self.pins | {name} if is_pinned else self.pins - {name})

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "adapters": {
                name: {"path": item.path, "variant": item.variant, "revision": item.revision} for name, item in self.adapters.items()
            },
            "hidden": {name: [list(file) for file in signature] for name, signature in self.hidden.items()},
            "aliases": {alias: dict(targets) for alias, targets in self.aliases.items()},
            "pins": sorted(self.pins),
        }

    @classmethod
    def parse(cls, raw: Any) -> Self:
        """Raises ValueError, and says what is wrong."""
        whole = _dict(raw, "the file")
        if whole.get("format") != FORMAT:
            raise ValueError(f"its format is {str(whole.get('format'))[:40]!a}, but this version reads {FORMAT}")
        if unknown := sorted(set(whole) - {"format", "adapters", "hidden", "aliases", "pins"}):
            raise ValueError(f"it has the unknown key {unknown[0][:40]!a}")
        pins = whole.get("pins", [])
        if not isinstance(pins, list) or not all(isinstance(name, str) for name in pins):
            raise ValueError("pins must be a list of names")
        return cls(
            {name: _registered(name, item) for name, item in _dict(whole.get("adapters", {}), "adapters").items()},
            {name: _signature(name, item) for name, item in _dict(whole.get("hidden", {}), "hidden").items()},
            {alias: _targets(alias, item) for alias, item in _dict(whole.get("aliases", {}), "aliases").items()},
            frozenset(pins),
        )


def _without(items: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in items.items() if key != name}


def _dict(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{what} must be an object")
    return value


def _registered(name: str, raw: Any) -> Registered:
    item = _dict(raw, f"adapters.{name}")
    path, variant, revision = item.get("path"), item.get("variant"), item.get("revision")
    is_ok = isinstance(path, str) and isinstance(variant, str | None) and isinstance(revision, str) and _REVISION.fullmatch(revision)
    if not is_ok or set(item) != {"path", "variant", "revision"}:
        raise ValueError(f"adapters.{name} must have path, variant and revision")
    assert isinstance(path, str)
    assert isinstance(revision, str)
    return Registered(path, variant, revision)


def _signature(name: str, raw: Any) -> Signature:
    if not isinstance(raw, list):
        raise ValueError(f"hidden.{name} must be a list")
    files = []
    for file in raw:
        match file:
            case [str(called), int(size), int(changed), int(mode)]:
                files.append((called, size, changed, mode))
            case _:
                raise ValueError(f"hidden.{name}: a file is a name and three numbers")
    return tuple(files)


def _targets(alias: str, raw: Any) -> dict[str, int]:
    targets = _dict(raw, f"aliases.{alias}")
    if not targets or not all(isinstance(weight, int) and not isinstance(weight, bool) and weight >= 0 for weight in targets.values()):
        raise ValueError(f"aliases.{alias} must have targets with whole weights")
    return targets


class StateDirectory:
    """The directory of one server, made where it is missing; owned until `close`.

    Args:
        is_strict: a file that cannot be understood is left where it is and refused, rather than set aside.
    Raises:
        InvalidRequest: it cannot be used, or another server owns it.
    """

    def __init__(self, folder: Path, *, is_strict: bool = False) -> None:
        self._folder, self._is_strict = folder, is_strict
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise InvalidRequest(f"state_dir: {folder} cannot be used ({error.strerror}); choose another", param="state_dir") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise InvalidRequest(
                f"state_dir: another server uses {folder}; stop it, or choose another directory", param="state_dir"
            ) from None

    def close(self) -> None:
        os.close(self._lock)

    def read(self) -> tuple[RegistryState, str | None]:
        """What was written last, and why that is nothing, where the file cannot be understood: it is kept beside under another name then.

        Raises:
            InvalidRequest: it cannot be read, or, strictly, not be understood.
        """
        for leftover in self._folder.glob(f".{_FILE}.*"):  # of a process that was killed while it wrote
            leftover.unlink(missing_ok=True)
        place = self._folder / _FILE
        try:
            if place.stat().st_size > MAX_BYTES:
                raise ValueError(f"it has more than {MAX_BYTES} bytes")
            return RegistryState.parse(json.loads(place.read_bytes().decode("utf-8"))), None
        except FileNotFoundError:
            return RegistryState(), None
        except OSError as error:
            raise InvalidRequest(f"state_dir: {place} cannot be read ({error.strerror})", param="state_dir") from None
        except (ValueError, RecursionError) as error:
            if self._is_strict:
                raise InvalidRequest(
                    f"state_dir: {place} cannot be understood ({error}); mend it, or move it away", param="state_dir"
                ) from None
            aside = place.with_name(f"{_FILE}.{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}.bad")
            os.replace(place, aside)
            return RegistryState(), f"{place} cannot be understood ({error}); it is kept as {aside.name}"

    def write(self, state: RegistryState) -> None:
        """Make `state` what the next start reads, whole or not at all. Blocks: for a worker thread.

        Raises:
            RegistryWriteFailed: it could not be written; what was there before is there still.
        """
        try:
            replace_file(self._folder / _FILE, json.dumps(state.to_json(), indent=1).encode("ascii"))
        except OSError as error:
            logger.error("the registry's state cannot be written: %s", error)
            raise RegistryWriteFailed(
                f"the state directory cannot be written ({error.strerror}), so nothing was changed; make room there and try again"
            ) from None
