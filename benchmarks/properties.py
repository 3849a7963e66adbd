"""The properties of P for every method, as docs/properties.md shows them.

    python benchmarks/properties.py     # a minute

It is `unilora analyze` with its defaults (q and v of 4 layers of width 64, r = 4), and for some methods with the sizes
of the paper's RoBERTa-base (12 layers of width 768, d = 23,040), where P is looked at in part. Results:
``benchmarks/results/properties_*.csv`` and ``properties.png``; the tables are written into the page, between comments.
"""

import re

from common import DOCS, RESULTS, SMOKE, parser, table

from unilora_cli.commands.analyze import draw_support, table_of, write_figures
from unilora_cli.commands.analyze_cases import made_up, planned
from unilora_core import analyze

PAGE = DOCS / "properties.md"
LAYOUTS = {
    "small": (4, 64, "auto", ["all"]),
    "roberta": (12, 768, 23_040, ["uni-lora", "uni-lora/iid", "lora", "vera", "fastfood"]),
}
if SMOKE:
    LAYOUTS = {"small": (1, 16, "auto", ["uni-lora", "vera"]), "roberta": (2, 32, 64, ["uni-lora", "fastfood"])}


def measured(name: str) -> str:
    """The table of a layout in Markdown; its figures, and the picture, are written down."""
    layers, width, d, methods = LAYOUTS[name]
    cases = planned(methods, made_up(layers, width), {"rank": 4, "d": d, "seed": 0}, {})
    found = [(case, analyze(case.spec, case.targets, case.frozen)) for case in cases]
    write_figures(RESULTS / f"properties_{name}.csv", found)
    if name == "small":
        draw_support(RESULTS / "properties.png", cases)
    return table(table_of(found))


def main() -> None:
    parser(__doc__).parse_args()
    page = PAGE.read_text(encoding="utf-8")
    for name in LAYOUTS:
        before, mark, rest = re.split(rf"(<!-- {name}: .*? -->\n)", page)
        after = rest[rest.index("\n<!-- end -->") :]
        made = measured(name)
        print(made)
        page = f"{before}{mark}{made}{after}"
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
