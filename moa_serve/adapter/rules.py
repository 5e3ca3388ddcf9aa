"""How the scores of an adapter's routers become weights (RouterRule), and what a request may change of it (RoutingOptions).

A request names experts and numbers; `rules_for` makes of them, for one adapter, the rule of every router that is not the adapter's own.
What becomes the same rules is the same: an explicit default equals an omitted one, and both share keys and values. No tensors here;
everything is immutable and shared freely between threads.
"""

import functools
import hashlib
import json
import re
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, NoReturn

from moa_serve.adapter.manifest import (
    KINDS,
    MAX_EXPERTS,
    Manifest,
    RouterPlan,
    Select,
    SelectConstant,
    SelectThresholdFn,
    SelectTopK,
)
from moa_serve.errors import InvalidRequest, shown

MAX_THRESHOLD_SCALE = 100.0
MAX_NAMED = 64
"""Entries in `disable` and in `force`; one may name many experts and layers."""

_ENTRY = re.compile(r"(\*|[A-Z_]{1,16}(?:/[0-9]{1,3})?)(?:@([0-9]{1,4})(?:-([0-9]{1,4}))?)?")
Router = tuple[int, str]  # its layer, and its site: "layer" or a target


@dataclass(frozen=True, slots=True)
class RouterRule:
    """What of E experts with scores s (T, E) is kept, and how it is weighed:

        t = threshold, or threshold * sigmoid(v.x + c) where it is a function
        v = s - t where it is subtracted, else s
        kept: not disabled, and forced or s >= t (v > 0 where it is subtracted); of these, with top_k, the forced and then the k largest v
        g = v where kept, else exactly 0; divided by their sum where renormalised

    Args:
        threshold: None: nothing has to be reached.
        is_function: `threshold` is the upper bound of a function of the token (Sparse MoA, AdaMoLE).
        subtracts: AdaMoLE.
        top_k: 0 is no limit. Of equals the first is kept.
        renormalises: MoLA, AdaMoLE.
        disabled, forced: outputs, as bits.
    """

    threshold: float | None = None
    is_function: bool = False
    subtracts: bool = False
    top_k: int = 0
    renormalises: bool = False
    disabled: int = 0
    forced: int = 0

    @classmethod
    def of(cls, select: Select, num_outputs: int) -> "RouterRule":
        """That of an adapter's own router with so many outputs."""
        if isinstance(select, SelectConstant):
            return cls(threshold=select.threshold)
        if isinstance(select, SelectThresholdFn):
            return cls(threshold=select.max_threshold, is_function=True)
        if isinstance(select, SelectTopK):
            return cls(top_k=select.k, renormalises=True)
        if select.kind == "adamole":
            return cls(threshold=1.0 / num_outputs, is_function=True, subtracts=True, renormalises=True)
        return cls()

    def plain(self, router: RouterPlan) -> "RouterRule":
        """The same rule in the one form that all have which do the same with a router's experts; numbers as float32 has them."""
        able = router.used & ~self.disabled
        if not able:
            return RouterRule(disabled=router.used)
        rule = replace(self, disabled=self.disabled & router.used)
        if rule.threshold is not None:
            rule = replace(rule, threshold=_float32(rule.threshold))
        if rule.threshold == 0:
            # No score is below 0; and where it is subtracted, a function of the token is no more than the 0 that it multiplies.
            rule = replace(rule, is_function=False, threshold=0.0 if rule.subtracts else None)
        if rule.top_k >= able.bit_count():
            rule = replace(rule, top_k=0)
        if rule.top_k:  # outputs that weigh nothing are no candidates
            rule = replace(rule, disabled=rule.disabled | router.all_outputs & ~router.used)
        if rule.threshold is None and not rule.top_k:
            rule = replace(rule, forced=0)
        return rule


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingOptions:
    """What a request asks of its adapter's routers. Checked when made, as far as no adapter is needed for it; `rules_for` checks the rest.

    Args:
        mode: "soft" keeps every expert, "sparse" those that the threshold or `top_k` lets through: the adapter's own, or those given here.
            None is the adapter's own way, or sparse where `threshold` or `top_k` is given.
        threshold: a number from 0 to 1, or {"constant": t}: a score must reach t. {"scale": f}: it must reach f times the adapter's own
            threshold, f from 0 to 100. AdaMoLE subtracts it.
        top_k: of what is kept, the k experts of each router with the largest weights; 1 or more, and at most what the largest router has.
        disable: experts that are not computed, up to 64 entries such as "PROMPT", "Q@3-9" (layers, both included), "*@20", "Q/0@5", or "Q"
            for all of a linear's experts.
        force: experts that are kept whatever they score, with their own weights; entries as in `disable`.
    Raises:
        InvalidRequest: `param` is the field, behind "moa.".
    """

    mode: str | None = None
    threshold: float | Mapping[str, float] | None = None
    top_k: int | None = None
    disable: tuple[str, ...] | list[str] = ()
    force: tuple[str, ...] | list[str] = ()

    def __post_init__(self) -> None:
        if self.mode not in (None, "soft", "sparse"):
            _refuse("mode", f"is {shown(self.mode)}, but must be 'soft' or 'sparse'")
        scale, constant = self._numbers()
        if self.mode == "soft" and (scale is not None or constant is not None or self.top_k is not None):
            which = "top_k" if self.top_k is not None else "threshold"
            _refuse(which, "goes with mode 'sparse': soft keeps every expert; leave one of the two out")
        if self.top_k is not None and (not isinstance(self.top_k, int) or isinstance(self.top_k, bool) or self.top_k < 1):
            _refuse("top_k", f"is {shown(self.top_k)}, but must be a whole number of 1 or more")
        for name in ("disable", "force"):
            object.__setattr__(self, name, _entries(name, getattr(self, name)))

    @classmethod
    def of(cls, options: Mapping[str, Any] | None) -> "RoutingOptions | None":
        """From a mapping with these names; None where nothing is asked.

        Raises:
            InvalidRequest: a name that is none of them, or a value out of its bounds.
        """
        if options is None:
            return None
        if not isinstance(options, Mapping):
            raise InvalidRequest(f"moa must be an object of routing options, not {shown(options)}", param="moa")
        known = [item.name for item in fields(cls)]
        for name in options:
            if name not in known:
                raise InvalidRequest(f"moa has {shown(name)}, which is no routing option; there are {', '.join(known)}", param="moa")
        made = cls(**{name: value for name, value in options.items() if value is not None})
        return None if made == cls() else made

    def _numbers(self) -> tuple[float | None, float | None]:
        """(scale, constant) of the threshold, at most one of them not None."""
        asked = self.threshold
        if asked is None:
            return None, None
        kind, value = "constant", asked
        if isinstance(asked, Mapping):
            if len(asked) != 1 or not set(asked) <= {"scale", "constant"}:
                _refuse("threshold", "is an object, but must have one of 'scale' and 'constant'")
            kind, value = next(iter(asked.items()))
        limit = MAX_THRESHOLD_SCALE if kind == "scale" else 1.0
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= limit:
            _refuse("threshold", f"is {shown(asked)}, but a {kind} must be a number from 0 to {limit:g}")
        return (float(value), None) if kind == "scale" else (None, float(value))

    @property
    def scale(self) -> float | None:
        return self._numbers()[0]

    @property
    def constant(self) -> float | None:
        return self._numbers()[1]

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal where the same is asked."""
        return self.mode, *self._numbers(), self.top_k, self.disable, self.force

    @property
    def selects(self) -> bool:
        """Something is given that lets some experts through and others not."""
        return self.threshold is not None or self.top_k is not None


@dataclass(frozen=True, slots=True, eq=False)
class RoutingRules:
    """The routers of one adapter that a request has otherwise than the adapter. Equal where they do the same.

    Args:
        rules: by layer and site; routers that are left out follow the adapter's own.
        key: digest of `rules`: what keys and values depend on. Never empty.
    """

    rules: Mapping[Router, RouterRule]
    key: bytes = field(init=False)

    def __post_init__(self) -> None:
        told = [[layer, site, *asdict(rule).values()] for (layer, site), rule in sorted(self.rules.items())]
        object.__setattr__(self, "key", hashlib.sha256(json.dumps(told, allow_nan=False).encode()).digest())

    def get(self, layer: int, site: str) -> RouterRule | None:
        return self.rules.get((layer, site))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RoutingRules) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


def parse_options(text: str) -> dict[str, Any]:
    """Routing options written as JSON, checked as far as no adapter is needed for it.

    Raises:
        InvalidRequest: no object, nothing asked, an option that there is not, or one out of its bounds.
    """
    try:
        options = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"moa is no JSON ({error}); write it as '{{\"top_k\": 2}}'", param="moa") from None
    if RoutingOptions.of(options) is None:
        raise InvalidRequest("moa asks for nothing; give a routing option such as threshold, top_k or disable", param="moa")
    return dict(options)


def rules_for(options: RoutingOptions | None, manifest: Manifest | None, *, pressure: float = 1.0) -> RoutingRules | None:
    """The rules of a request with `options` under an adapter; None where nothing differs from the adapter's own.

    Args:
        manifest: None is the base alone.
        pressure: the server's factor on thresholds that no option has set, at least 1; adapters without one do not care.
    Raises:
        InvalidRequest: the adapter has no router, or not what an option needs; the message has the names or bounds that there are.
    """
    if manifest is None or manifest.router.site == "none":
        if options is None:
            return None
        which = "the base alone has none" if manifest is None else f"all experts of a {manifest.variant} always count"
        raise InvalidRequest(f"moa.{_first(options)} needs an adapter with a router, but {which}; leave it out or choose another model",
                             param=f"moa.{_first(options)}")  # fmt: skip
    if options is None:
        if pressure == 1.0 or not _has_threshold(manifest):
            return None
        options = RoutingOptions()
    return _resolved(_Asked(manifest, options, pressure))


def yields(options: RoutingOptions | None, manifest: Manifest | None) -> bool:
    """Whether `pressure` would raise the thresholds of a request: the adapter has some, and no option has set another."""
    if manifest is None or not RouterRule.of(manifest.router.select, 1).threshold:
        return False
    return options is None or (options.mode != "soft" and options.threshold is None)


def echo(options: RoutingOptions, manifest: Manifest) -> dict[str, Any]:
    """`options` as a response says them, with the mode that they mean."""
    own_is_sparse = manifest.router.select.kind != "all"
    told: dict[str, Any] = {"mode": options.mode or ("sparse" if options.selects or own_is_sparse else "soft")}
    if options.threshold is not None:
        told["threshold"] = {"constant": options.constant} if options.scale is None else {"scale": options.scale}
    if options.top_k is not None:
        told["top_k"] = options.top_k
    for name in ("disable", "force"):
        if entries := getattr(options, name):
            told[name] = list(entries)
    return told


def _has_threshold(manifest: Manifest) -> bool:
    return manifest.router.select.kind in ("constant", "threshold_fn", "adamole")


@dataclass(frozen=True, slots=True, eq=False)
class _Asked:
    """A question that has one answer. Manifests are compared as objects: as long as one is in a question, no other has its place."""

    manifest: Manifest
    options: RoutingOptions
    pressure: float

    def _key(self) -> tuple[Any, ...]:
        return id(self.manifest), self.options.key, self.pressure

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Asked) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())


@functools.lru_cache(maxsize=64)
def _resolved(asked: _Asked) -> RoutingRules | None:
    return _Resolver(asked.options, asked.manifest, asked.pressure).rules()


class _Resolver:
    def __init__(self, options: RoutingOptions, manifest: Manifest, pressure: float) -> None:
        self.options, self.manifest, self.pressure = options, manifest, pressure

    def rules(self) -> RoutingRules | None:
        self._check()
        disabled, forced = self._outputs("disable"), self._outputs("force")
        found = {}
        for number, router in enumerate(self.manifest.routers):
            if both := disabled[number] & forced[number]:
                name = next(name for name, bit in router.experts.items() if bit & both)
                _refuse("force", f"has {name!r} of layer {router.layer}, which disable has as well; leave it out of one of them")
            own = RouterRule.of(self.manifest.router.select, router.num_outputs)
            rule = replace(self._selection(own), disabled=disabled[number], forced=forced[number]).plain(router)
            if rule != own.plain(router):
                found[router.layer, router.site] = rule
        return RoutingRules(found) if found else None

    def _check(self) -> None:
        options, kind = self.options, self.manifest.router.select.kind
        if options.mode == "sparse" and kind == "all" and not options.selects:
            _refuse("mode", f"is 'sparse', but a {self.manifest.variant} has no threshold of its own; give moa.threshold or moa.top_k")
        if options.scale is not None and not _has_threshold(self.manifest):
            _refuse("threshold", f"has a scale, but a {self.manifest.variant} has no threshold to scale; give a constant")
        most = max(router.used.bit_count() for router in self.manifest.routers)
        if options.top_k is not None and options.top_k > most:
            _refuse("top_k", f"is {shown(options.top_k)}, but the largest router of this adapter has {most} weights to choose from")
        if options.force and kind == "adamole":
            _refuse("force", "does not go with AdaMoLE, which weighs an expert by what it is above the threshold")

    def _selection(self, own: RouterRule) -> RouterRule:
        options, rule = self.options, own
        if options.mode == "soft":
            return replace(rule, threshold=None, is_function=False, subtracts=False, top_k=0)
        if options.constant is not None:
            rule = replace(rule, threshold=options.constant, is_function=False)
        elif rule.threshold is not None:
            factor = self.pressure if options.scale is None else options.scale
            rule = replace(rule, threshold=rule.threshold * factor)
        return rule if options.top_k is None else replace(rule, top_k=options.top_k)

    def _outputs(self, param: str) -> list[int]:
        """Of each router the outputs that the entries of an option name, as bits."""
        routers = self.manifest.routers
        found = [0] * len(routers)
        named: dict[int, set[str]] = {}  # of routers whose outputs weigh several experts, by number
        for entry in getattr(self.options, param):
            name, first, last = self._parsed(param, entry)
            is_met = False
            for number, router in enumerate(routers):
                if first <= router.layer <= last and (bits := router.used if name == "*" else router.bits.get(name, 0)):
                    found[number] |= bits
                    is_met = True
                    if router.shares:
                        named.setdefault(number, set()).update(router.experts if name == "*" else (name,))
            if not is_met:
                _refuse(param, f"has {entry!r}, but there is no such expert in those layers; there are {self._there_are()}")
        for number, names in named.items():
            # One output weighs several experts (UniPEFT): they go together.
            left = [name for name, bit in routers[number].experts.items() if bit & found[number] and name not in names]
            if left:
                which = f"{', '.join(sorted(names))} of layer {routers[number].layer}"
                _refuse(param, f"has {which}, which share a weight with {', '.join(left)}: name all of them")
        return found

    def _parsed(self, param: str, entry: str) -> tuple[str, int, int]:
        """(name, first layer, last layer) of an entry."""
        match = _ENTRY.fullmatch(entry)
        layers = self.manifest.base.num_layers
        if match is None:
            _refuse(param, f"has {shown(entry)}, but entries are like 'PROMPT', 'Q@3-9' or '*@20'; there are {self._there_are()}")
        name, first, last = match.group(1, 2, 3)
        low = int(first or 0)
        high = int(last) if last is not None else low if first is not None else layers - 1
        if not low <= high < layers:
            _refuse(param, f"has {entry!r}, but layers go from 0 to {layers - 1}, and the first of a range is not above the last")
        return name, low, high

    def _there_are(self) -> str:
        names = {name: None for router in self.manifest.routers for name in router.experts}
        ordered = sorted(names, key=lambda name: (KINDS.index(name.partition("/")[0]), int(name.partition("/")[2] or 0)))
        return ", ".join(ordered[:MAX_EXPERTS])


def _entries(param: str, value: object) -> tuple[str, ...]:
    if not isinstance(value, tuple | list) or not all(isinstance(entry, str) for entry in value):
        _refuse(param, f"is {shown(value)}, but must be a list of experts such as 'PROMPT' or 'Q@3-9'")
    if len(value) > MAX_NAMED:
        _refuse(param, f"has {len(value)} entries, but at most {MAX_NAMED} are allowed; '*' and layer ranges name many at once")
    return tuple(sorted(set(value)))


def _first(options: RoutingOptions) -> str:
    return next(item.name for item in fields(options) if getattr(options, item.name) not in (None, ()))


def _float32(value: float) -> float:
    found: float = struct.unpack("f", struct.pack("f", value))[0]
    return found


def _refuse(param: str, problem: str) -> NoReturn:
    raise InvalidRequest(f"moa.{param} {problem}", param=f"moa.{param}")
