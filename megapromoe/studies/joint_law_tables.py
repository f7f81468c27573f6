"""The section of a study's report on the joint law of active parameters, experts and images."""

from __future__ import annotations

from collections.abc import Iterable

from megapromoe.studies import markdown
from megapromoe.studies.collect import LOSS
from megapromoe.studies.fit import FitError
from megapromoe.studies.joint_law import CONSTANT, SYMBOLS, JointLaw, fit_joint_law
from megapromoe.studies.recipe import Recipe
from megapromoe.studies.seed_statistics import Rows

TITLE = "## Joint law, L = e + a N^-α + b E^-β + c D^-γ"


def joint_laws(rows: Rows, recipe: Recipe, key: str = LOSS) -> dict[str, JointLaw | str]:
    """Variant -> the law of its runs, or why there is none; without variants that vary in less than two variables."""
    laws: dict[str, JointLaw | str] = {}
    for variant in recipe.variants:
        family = [row for row in rows if row["variant"] == variant.name and row.get(key) is not None]
        names = [name for name in SYMBOLS if all(row.get(name) for row in family)]
        values = {name: [row[name] for row in family] for name in names}
        if sum(max(column) > CONSTANT * min(column) for column in values.values() if column) < 2:
            continue
        try:
            laws[variant.name] = fit_joint_law(values, [row[key] for row in family], [row["seed"] for row in family])
        except FitError as error:
            laws[variant.name] = str(error)
    return laws


def joint_law_sections(rows: Rows, recipe: Recipe) -> Iterable[str]:
    """Markdown: the law of each variant with the intervals of its constants, and the reasons where there is none."""
    laws = joint_laws(rows, recipe)
    if not laws:
        return
    yield TITLE
    yield (
        "N: active parameters, E: routed experts, D: images of the training; a variable that does not vary is part of"
        " the constant e. In brackets: 95 % intervals of a bootstrap over seeds. Gain: by how much the term falls from"
        " the smallest to the largest value in the study."
    )
    head = ["model", "points", "e", "term", "exponent", "gain", "supported"]
    lines = [head]
    for variant, law in laws.items():
        if isinstance(law, str):
            continue
        low, high = law.constant_interval
        constant = f"{law.constant:.4g} ({low:.4g} to {high:.4g})"
        verdict = f"no: {'; '.join(law.fit_warnings)}" if law.fit_warnings else "yes"
        for name, term in law.terms.items():
            exponent = "{:.3g} ({:.2g} to {:.2g})".format(term.exponent, *term.interval)
            gain = "{:.3g} ({:.2g} to {:.2g})".format(term.gain, *term.gain_interval)
            of_term = [f"{term.coefficient:.3g} {SYMBOLS[name]}^-{term.exponent:.3g}", exponent, gain]
            lines.append([variant, str(law.arms), constant, *of_term, verdict])
    if len(lines) > 1:
        yield markdown.table(lines)
    for variant, law in laws.items():
        if isinstance(law, str):
            yield f"None for {variant}: {law}."
