"""What a person may set when a law is fitted and asked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from cpt.base.errors import UsageError

SCALES = ("log", "linear")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a law is fitted, checked and asked.

    Args:
        tolerance: how far the general loss may rise above the base model's [fraction of it].
        eps_g: the same as an amount [nats/token]; one of the two at most.
        base_losses: loss of the base model on each corpus [nats/token]; goes before what the table says.
        base_n_params: size of the model that `base_losses` were measured on [parameters]; `analyse` sets it.
        n_params: size of the model that is asked about [parameters]; without it the largest of the table.
        tokens: length of the training that is asked about [tokens]; without it the longest of the table.
        domain_tokens: distinct domain tokens there are; the total then follows from the ratio [tokens].
        epochs: how often the domain tokens may be read.
        budget: largest total length when `domain_tokens` is given [tokens].
        compute: compute to be split between size and tokens [FLOPs].
        ratio: domain share at which `compute` is split; without it the recommended one [fraction].
        caps: for mixtures of several corpora, most tokens to read of each [tokens].
        limits: for mixtures of several corpora, highest loss allowed on each [nats/token].
        goal: for mixtures of several corpora, weight of each loss in what is made small.
        k1, k2: for `law=cross_dcpt`, of the domain that is asked about: its loss before training [nats/token], and the
            rate at which it falls in a probe.
        penalty: for `law=cmr`, lambda: how much a general loss above its limit counts against the domain loss.
        bootstrap: number of resamples; 0 gives no intervals.
        seed: of starts and resamples.
        delta: where the Huber loss turns from square to line, in the fit's scale.
        scale: `log` compares logarithms of losses, `linear` the losses.
        compare: fit the other forms too and compare by held-out error.
        force: answer also for model sizes that the table says nothing about.
        decaying_lr: the runs' lr fell while they trained, so that only their last rows are finished runs.
        options: of the law itself.
    """

    tolerance: float | None = None
    eps_g: float | None = None
    base_losses: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    base_n_params: float | None = None
    n_params: float | None = None
    tokens: float | None = None
    domain_tokens: float | None = None
    epochs: float = 1.0
    budget: float | None = None
    compute: float | None = None
    ratio: float | None = None
    caps: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    limits: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    goal: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    k1: float | None = None
    k2: float | None = None
    penalty: float = 1000.0
    bootstrap: int = 200
    seed: int = 0
    delta: float = 1e-3
    scale: str = "log"
    compare: bool = True
    force: bool = False
    decaying_lr: bool = False
    options: Mapping[str, object] = field(default_factory=lambda: MappingProxyType({}))

    def __post_init__(self) -> None:
        if self.tolerance is not None and self.eps_g is not None:
            raise UsageError("`tolerance` and `eps_g` both limit the general loss", "give one of them")
        for name in ("tolerance", "eps_g"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise UsageError(f"`{name}` is {value:g}, wanted 0 or more")
        for name in ("n_params", "tokens", "domain_tokens", "budget", "compute", "epochs", "penalty", "delta"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise UsageError(f"`{name}` is {value:g}, wanted more than 0")
        if self.ratio is not None and not 0 <= self.ratio <= 1:
            raise UsageError(f"`ratio` is {self.ratio:g}, wanted 0 to 1")
        if self.bootstrap < 0:
            raise UsageError(f"`bootstrap` is {self.bootstrap}, wanted 0 or more")
        if self.scale not in SCALES:
            raise UsageError(f"`scale` is `{self.scale}`, wanted `log` or `linear`")
        for corpus, loss in self.base_losses.items():
            if not 0 < loss < float("inf"):
                raise UsageError(f"`base_{corpus}` is {loss:g}, wanted a loss above 0")
