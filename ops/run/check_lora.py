"""What `katana check` says of `learner.lora`: its package, its target modules, how much is trained."""

from __future__ import annotations

from common.config import Config, Lora
from common.failing import brief
from common.pretrained import ModelError, Pair
from ops.run.findings import Findings
from ops.run.heads import without_weights


def check_lora(config: Config, pair: Pair, found: Findings) -> None:
    """Adds a line, or the problems. Builds the student's layers without their weights, by torch."""
    lora = config.learner.lora
    if lora is None:
        return
    from learner.lora import missing

    if (problem := missing()) is not None:
        found.problems.append(problem)
    try:
        found.lines.append(_summary(lora, pair))
    except ModelError as error:
        found.problems.append(str(error))


def _summary(lora: Lora, pair: Pair) -> str:
    from learner.lora import targets_of

    try:
        model = without_weights(pair.student.folder)
    except Exception as error:  # a model's code may raise anything for an unexpected config
        raise ModelError(f"{pair.student.folder}: its layers cannot be made ({brief(error)})") from error
    targets = targets_of(model, lora.target_modules)
    trained = sum(lora.rank * sum(model.get_submodule(name).weight.shape) for name in targets)
    whole = sum(parameter.numel() for parameter in model.parameters())
    return (
        f"LoRA       rank {lora.rank}, alpha {lora.alpha:g}, dropout {lora.dropout:g} on {len(targets)} layers: "
        f"{trained:,} parameters are trained beside {whole:,} ({trained / whole:.2%})"
    )
