"""How the scores of an adapter's routers become weights (RouterRule), and what a request may change of it (RoutingOptions).

A request names experts and numbers; `rules_for` makes of them, for one adapter, the rule of every router that is not the adapter's own.
What becomes the same rules is the same: an explicit default equals an omitted one, and both share keys and values. No tensors here;
everything is immutable and shared freely between threads.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, NoReturn

from moa_serve.adapter.manifest import (
    KINDS,
    MAX_EXPERTS,
    LayerPlan,
    Manifest,
    Select,
    SelectConstant,
    SelectThresholdFn,
    SelectTopK,
)
from moa_serve.errors import InvalidRequest

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

    def plain(self, num_outputs: int) -> "RouterRule":
        """The same rule in the one form that all have which do the same."""
        rule = self
        if rule.threshold == 0 and not rule.subtracts:  # no score is below 0
            rule = replace(rule, threshold=None, is_function=False)
        if rule.top_k >= num_outputs - (rule.disabled & ((1 << num_outputs) - 1)).bit_count():
            rule = replace(rule, top_k=0)
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
            _refuse("mode", f"is {_shown(self.mode)}, but must be 'soft' or 'sparse'")
        scale, constant = self._numbers()
        if self.mode == "soft" and (scale is not None or constant is not None or self.top_k is not None):
            which = "top_k" if self.top_k is not None else "threshold"
            _refuse(which, "goes with mode 'sparse': soft keeps every expert; leave one of the two out")
        if self.top_k is not None and (not isinstance(self.top_k, int) or isinstance(self.top_k, bool) or self.top_k < 1):
            _refuse("top_k", f"is {_shown(self.top_k)}, but must be a whole number of 1 or more")
        for name in ("disable", "force"):
            object.__setattr__(self, name, _entries(name, getattr(self, name)))

    @classmethod
    def of(cls, options: Mapping[str, Any] | None) -> "RoutingOptions | None":
        """From a mapping with these names; None where nothing is asked.

        Raises:
            InvalidRequest: a name that is none of them, or a value out of its bounds.
        """
        if options is None or not options:
            return None
        if not isinstance(options, Mapping):
            raise InvalidRequest(f"moa must be a mapping of routing options, not {_shown(options)}", param="moa")
        known = [item.name for item in fields(cls)]
        for name in options:
            if name not in known:
                raise InvalidRequest(f"moa.{str(name)[:40]} is no routing option; there are {', '.join(known)}", param="moa")
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
            _refuse("threshold", f"is {_shown(asked)}, but a {kind} must be a number from 0 to {limit:g}")
        return (float(value), None) if kind == "scale" else (None, float(value))

    @property
    def scale(self) -> float | None:
        return self._numbers()[0]

    @property
    def constant(self) -> float | None:
        return self._numbers()[1]

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
    return _Resolver(options, manifest, pressure).rules()


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


def routers_of(manifest: Manifest) -> Iterator[tuple[Router, int, LayerPlan]]:
    """Every router that weighs experts, with its outputs and its layer's plan. Those inside nested experts have no rule."""
    for layer in range(manifest.base.num_layers):
        plan = manifest.layer(layer)
        if manifest.router.site == "layer" and plan.experts:
            yield (layer, "layer"), plan.num_outputs, plan
        elif manifest.router.site == "linear":
            for site in KINDS:
                if count := len(plan.at(site)):
                    yield (layer, site), count, plan


def _has_threshold(manifest: Manifest) -> bool:
    return manifest.router.select.kind in ("constant", "threshold_fn", "adamole")


class _Resolver:
    def __init__(self, options: RoutingOptions, manifest: Manifest, pressure: float) -> None:
        self.options, self.manifest, self.pressure = options, manifest, pressure
        self.routers = list(routers_of(manifest))

    def rules(self) -> RoutingRules | None:
        self._check()
        disabled, forced = self._outputs("disable"), self._outputs("force")
        for router in disabled.keys() & forced.keys():
            if both := disabled[router] & forced[router]:
                name = next(name for name, bit in self._named(router) if bit & both)
                _refuse("force", f"has {name!r} of layer {router[0]}, which disable has as well; leave it out of one of them")
        found = {}
        for router, outputs, plan in self.routers:
            own = RouterRule.of(self.manifest.router.select, outputs)
            rule = replace(self._selection(own), disabled=disabled.get(router, 0), forced=forced.get(router, 0))
            if rule.top_k and plan.columns:  # outputs that no expert takes are no candidates
                rule = replace(rule, disabled=rule.disabled | ((1 << outputs) - 1) & ~sum({1 << column for column in plan.columns}))
            if rule.plain(outputs) != own.plain(outputs):
                found[router] = rule.plain(outputs)
        return RoutingRules(found) if found else None

    def _check(self) -> None:
        options, kind = self.options, self.manifest.router.select.kind
        if options.mode == "sparse" and kind == "all" and not options.selects:
            _refuse("mode", f"is 'sparse', but a {self.manifest.variant} has no threshold of its own; give moa.threshold or moa.top_k")
        if options.scale is not None and not _has_threshold(self.manifest):
            _refuse("threshold", f"has a scale, but a {self.manifest.variant} has no threshold to scale; give a constant")
        most = max(outputs for _, outputs, _ in self.routers)
        if options.top_k is not None and options.top_k > most:
            _refuse("top_k", f"is {_shown(options.top_k)}, but the largest router of this adapter has {most} experts")
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

    def _named(self, router: Router) -> list[tuple[str, int]]:
        """The experts of a router by name, with the bit of the output that weighs each."""
        layer, site = router
        plan = self.manifest.layer(layer)
        if site == "layer":
            return [(expert.name, 1 << column) for expert, column in zip(plan.experts, plan.columns, strict=True)]
        return [(expert.name, 1 << expert.index) for expert in plan.at(site)]

    def _outputs(self, param: str) -> dict[Router, int]:
        """The outputs that the entries of an option name, as bits of each router."""
        found: dict[Router, int] = {}
        entries = getattr(self.options, param)
        named: dict[Router, set[str]] = {}
        for entry in entries:
            name, first, last = self._parsed(param, entry)
            is_met = False
            for router, _, _ in self.routers:
                if not first <= router[0] <= last:
                    continue
                for expert, bit in self._named(router):
                    if name in ("*", expert, expert.partition("/")[0]):
                        found[router] = found.get(router, 0) | bit
                        named.setdefault(router, set()).add(expert)
                        is_met = True
            if not is_met:
                _refuse(param, f"has {entry!r}, but there is no such expert in those layers; there are {self._there_are()}")
        self._check_shared(param, found, named)
        return found

    def _check_shared(self, param: str, found: Mapping[Router, int], named: Mapping[Router, set[str]]) -> None:
        """One output may weigh several experts (UniPEFT): they go together."""
        for router, bits in found.items():
            left = [name for name, bit in self._named(router) if bit & bits and name not in named[router]]
            if left:
                _refuse(param, f"has {', '.join(sorted(named[router]))} of layer {router[0]}, which share a weight with "
                               f"{', '.join(left)}: name all of them")  # fmt: skip

    def _parsed(self, param: str, entry: str) -> tuple[str, int, int]:
        """(name, first layer, last layer) of an entry."""
        match = _ENTRY.fullmatch(entry)
        layers = self.manifest.base.num_layers
        if match is None:
            _refuse(param, f"has {_shown(entry)}, but entries are like 'PROMPT', 'Q@3-9' or '*@20'; there are {self._there_are()}")
        name, first, last = match.group(1, 2, 3)
        low = int(first or 0)
        high = int(last) if last is not None else low if first is not None else layers - 1
        if not low <= high < layers:
            _refuse(param, f"has {entry!r}, but layers go from 0 to {layers - 1}, and the first of a range is not above the last")
        return name, low, high

    def _there_are(self) -> str:
        names = {name: None for router, _, _ in self.routers for name, _ in self._named(router)}
        ordered = sorted(names, key=lambda name: (KINDS.index(name.partition("/")[0]), int(name.partition("/")[2] or 0)))
        return ", ".join(ordered[:MAX_EXPERTS])


def _entries(param: str, value: object) -> tuple[str, ...]:
    if not isinstance(value, tuple | list) or not all(isinstance(entry, str) for entry in value):
        _refuse(param, f"is {_shown(value)}, but must be a list of experts such as 'PROMPT' or 'Q@3-9'")
    if len(value) > MAX_NAMED:
        _refuse(param, f"has {len(value)} entries, but at most {MAX_NAMED} are allowed; '*' and layer ranges name many at once")
    return tuple(sorted(set(value)))


def _first(options: RoutingOptions) -> str:
    return next(item.name for item in fields(options) if getattr(options, item.name) not in (None, ()))


def _shown(value: object) -> str:
    """A user's value for a message, short."""
    text = repr(value) if not isinstance(value, int) or abs(value) < 10**18 else "a number of many digits"
    return text if len(text) <= 60 else text[:57] + "..."


def _refuse(param: str, problem: str) -> NoReturn:
    raise InvalidRequest(f"moa.{param} {problem}", param=f"moa.{param}")
