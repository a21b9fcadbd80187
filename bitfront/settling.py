"""Which estimators a job's `auto` stands for, and which can score what its menu opens."""

from dataclasses import replace

from bitfront.config import AUTO, UNPROVEN, ConfigError
from bitfront.plan import Plan
from sensitivity import ESTIMATORS
from store.database import Store
from store.queries import audited_job


def settled(plan: Plan, store: Store) -> Plan:
    """The plan with what `auto` stands for among its estimators, and why."""
    if plan.online:
        plan = scoring_online(plan)
    if AUTO not in plan.config.estimators:
        return plan
    names = [scheme.name for scheme in plan.menu]
    known = audited_job(store, plan.checkpoint.weights_hash, plan.quantizer, names)
    if known:  # the best of a few that left out the usual ones is no default
        judged = {entry["name"] for entry in known.facts["audit"]["estimators"]}
        known = known if judged.issuperset(UNPROVEN) else None
    if known and plan.online and not ESTIMATORS[known.facts["audit"]["default"]].online:
        known = None  # it was the best for weights alone
    found: tuple[str, ...] = UNPROVEN
    evidence = None
    why = "this model was never audited with this menu; `bitfront audit` finds its best"
    if known:
        found, why = (known.facts["audit"]["default"],), f"the best of the audit of job {known.id}"
        evidence = {"job": known.id, **known.facts["audit"]}
    places = [found if name == AUTO else (name,) for name in plan.config.estimators]
    estimators = tuple(dict.fromkeys(name for place in places for name in place))
    config = plan.config.model_copy(update={"estimators": estimators})
    because = f"{AUTO}: {' and '.join(found)}, {why}"
    return replace(plan, config=config, because=because, evidence=evidence)


def scoring_online(plan: Plan) -> Plan:
    """Without the estimators that know nothing of KV caches and activations.

    Raises:
        ConfigError: none is left.
    """
    wanted = plan.config.estimators
    able = tuple(name for name in wanted if name == AUTO or ESTIMATORS[name].online)
    if not able:
        known = ", ".join(name for name in ESTIMATORS if ESTIMATORS[name].online)
        raise ConfigError(
            f"{', '.join(wanted)} can't score KV caches and activations, whose formats this job "
            "chooses; give "
            f"--estimators {known.split(', ')[0]}, or others of {known}"
        )
    return replace(plan, config=plan.config.model_copy(update={"estimators": able}))
