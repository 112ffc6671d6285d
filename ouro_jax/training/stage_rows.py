"""The rows that a stage trains on, and what is refused before it starts."""

from etils import epath

from ouro_jax.config import Config
from ouro_jax.data.bad_rows import BadRows
from ouro_jax.data.mixture import Mixture, open_mixture
from ouro_jax.errors import ConfigError
from ouro_jax.training.curriculum import StagePlan, first_rows


def open_stage_mixture(
    config: Config, root: epath.Path, plan: StagePlan, bad_rows: BadRows | None = None
) -> Mixture:
    """The training rows of a stage; each source goes on where the earlier stages left it.

    Unreadable rows are counted in `bad_rows` and skipped; without it, they end the reading.

    Raises ConfigError as `open_mixture` does, and if a source would be read more often than
    `max_epochs` allows.
    """
    mixture = open_mixture(
        root,
        plan.stage.mixture,
        sequence_length=plan.stage.sequence_length,
        seed=config.seed,
        expected_vocab_size=config.model.vocab_size,
        first_rows=first_rows(config, plan.name),
        skip_rows=plan.stage.skip_rows,
        # Every stage knows all sources, so that a source has one order of rows in all of them.
        other_sources=[name for stage in config.stages.values() for name in stage.mixture],
        bad_rows=bad_rows,
    )
    _check_epochs(plan, mixture)
    return mixture


def _check_epochs(plan: StagePlan, mixture: Mixture) -> None:
    stage, limit = plan.stage, plan.stage.max_epochs
    holds = {name: summary.rows for name, summary in mixture.describe().items()}
    needs = [
        f"{name!r} holds {holds[name]:,} rows and would give {epochs * holds[name]:,.0f} "
        f"({epochs:.4g} epochs)"
        for name, epochs in mixture.epochs(plan.total_rows).items()
        if limit and epochs > limit
    ]
    if needs:
        raise ConfigError(
            f"stages.{plan.name}.max_epochs = {limit:g}: up to the end of this stage, source "
            f"{'; '.join(needs)}; rows of {stage.sequence_length:,} tokens, those of earlier "
            "stages counted. Prepare more of it, lower its share or the tokens of the stages, or "
            "raise max_epochs (0: no limit)."
        )
