"""How alike networks of different starts are once their units are in one order.

No permuted network is handed on, so none is verified.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from .. import loading
from ..inputs import Source
from ..names import is_head, is_statistic, is_weight
from ..streaming import one_blas_thread
from .align import Arrays, cosine, floats, opened
from .apply import permute
from .matching import match


def aligned_cosines(
    sources: Sequence[Source],
    pairs: Iterable[tuple[int, int]],
    *,
    arch: str | None = None,
    seed: int = 0,
    restarts: int = 0,
    on_progress: Callable[..., None] | None = None,
) -> dict[tuple[int, int], float]:
    """Cosine of the weights of two or more dimensions, heads left out, of these pairs, each aligned by itself.

    The networks are of one architecture, so that one trace serves all of them. All weights are held in memory.

    Raises:
        DmmError: a module cannot be built or traced, no unit may move, or weights are not finite.
    """
    spec, first, _, _ = opened(sources[0], arch, (), {})
    held = [first, *(floats(source, loading.load_model(source, arch)[0]) for source in sources[1:])]
    names = [name for name in first if name in spec.tensors and not is_statistic(name) and not is_head(name)]
    judged = [name for name, info in sources[0].tensors.items() if is_weight(info)]
    compared: list[Arrays] = [{name: arrays[name] for name in names} for arrays in held]
    found = {}
    pairs = list(pairs)
    with one_blas_thread():
        for number, (a, b) in enumerate(pairs):
            image = match(compared[a], held[b], spec, seed=seed, restarts=restarts).image
            moved = permute({name: held[b][name] for name in judged}, spec, image)
            found[a, b] = cosine(held[a], moved, judged)
            if on_progress:
                on_progress("align", number + 1, len(pairs))
    return found
