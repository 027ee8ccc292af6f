"""Draw the model, from its config, into nbs/images/architecture.svg:  python .ci/architecture.py

A picture in a page cannot know whether the page is light or dark. So all text stands inside filled boxes,
and the arrows between them are of a grey that shows on white and on black.
"""
import sys
from pathlib import Path

root = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(root))

from nanomoe.config import ModelConfig  # noqa: E402

GREY, INK = "#80868f", "#1b1d21"
BLUE, GREEN, ORANGE, SKY, PURPLE, PAPER = "#a9cfe8", "#a5dcc8", "#f5cf85", "#cfe9f8", "#e6c6d9", "#eef0f2"


def box(x, y, width, height, title, detail="", fill=PAPER):
    middle, up = x + width / 2, 7 if detail else 0
    text = f'<text x="{middle:g}" y="{y + height / 2 + 5 - up:g}" class="title">{title}</text>'
    if detail: text += f'<text x="{middle:g}" y="{y + height / 2 + 14:g}">{detail}</text>'
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="8" fill="{fill}"/>{text}'


def line(*points, arrow=True, dashed=False):
    path = "M" + " L".join(f"{x:g} {y:g}" for x, y in points)
    tip, dashes = ' marker-end="url(#tip)"' if arrow else "", ' stroke-dasharray="4 4"' if dashed else ""
    return f'<path d="{path}"{tip}{dashes}/>'


def plus(x, y):
    return f'<circle cx="{x}" cy="{y}" r="11" fill="{PAPER}"/><text x="{x}" y="{y + 6}" class="title">+</text>'


def architecture_svg(cfg: ModelConfig) -> str:
    "The model on the left, and what happens to one token in its mixture of experts on the right."
    left = [  # y, height, title, detail, colour: from bottom to top
        (530, 50, "tokens", "numbers from the tokenizer", PAPER),
        (450, 50, "embedding", f"{cfg.vocab_size:,} tokens x {cfg.d_model} numbers", SKY),
        (350, 50, "attention", f"RMSNorm, then {cfg.n_heads} heads, {cfg.n_kv_heads} of keys", BLUE),
        (200, 50, "mixture of experts", f"RMSNorm, then {cfg.top_k} of {cfg.num_experts}, and {cfg.num_shared_experts} shared", GREEN),
        (80, 50, "output head", "RMSNorm, then the embedding again", SKY),
        (0, 50, "a score for every token", f"{cfg.vocab_size:,} numbers", PAPER),
    ]
    x, width, middle = 50, 250, 175
    parts = [f'<rect x="10" y="148" width="330" height="284" rx="14" fill="none" stroke="{GREY}" stroke-dasharray="6 5"/>',
             box(262, 410, 70, 30, f"x {cfg.n_layers}", fill=PAPER)]
    parts += [line((middle, 530), (middle, 506)), line((middle, 450), (middle, 406)),                     # up the trunk
              line((middle, 350), (middle, 323), arrow=False), line((middle, 301), (middle, 256)),
              line((middle, 200), (middle, 186), arrow=False), line((middle, 164), (middle, 136)), line((middle, 80), (middle, 56)),
              line((middle, 420), (28, 420), (28, 312), (158, 312)), line((middle, 275), (28, 275), (28, 175), (158, 175))]  # past the layer
    parts += [plus(middle, 312), plus(middle, 175)]
    parts += [box(x, y, width, height, title, detail, fill) for y, height, title, detail, fill in left]
    # one token in the mixture
    gap, first = 12, 400
    count = cfg.num_experts + cfg.num_shared_experts
    w = (520 - (count - 1) * gap) / count
    places = [first + i * (w + gap) for i in range(count)]
    centre, chosen = first + 260, [1, cfg.num_experts - 1] if cfg.top_k == 2 and cfg.num_experts > 2 else list(range(cfg.top_k))
    parts += [line((300, 225), (first - 22, 225), (first - 22, 20), (first - 2, 20), arrow=False, dashed=True),
              box(first - 2, 0, 524, 40, "inside: the way of one token", fill=GREEN),
              box(centre - 120, 530, 240, 50, "a token", f"{cfg.d_model} numbers", PAPER),
              line((centre, 530), (centre, 496)),
              box(centre - 120, 440, 240, 50, "router", f"{cfg.num_experts} scores; the best {cfg.top_k} count", ORANGE)]
    for i, left_edge in enumerate(places):
        routed, at = i < cfg.num_experts, left_edge + w / 2
        if routed and i in chosen:
            parts += [line((at, 400), (at, 326)), line((at, 240), (at, 186))]
            parts += [line((centre, 440), (centre, 400), (at, 400), arrow=False)]
        if not routed: parts += [line((centre + 120, 555), (at, 555), (at, 326)), line((at, 240), (at, 186))]
        resting = routed and i not in chosen
        parts.append(box(left_edge, 240, w, 80, f"expert {i}" if routed else "shared", "rests" if resting else f"{cfg.d_ff} wide",
                         PAPER if resting else GREEN if routed else PURPLE))
    parts += [box(first, 140, 520, 40, "sum, with the weights of the router", fill=PAPER),
              line((centre, 140), (centre, 108)), box(centre - 120, 62, 240, 40, f"{cfg.d_model} new numbers", fill=PAPER)]
    head = ('<svg xmlns="http://www.w3.org/2000/svg" viewBox="-10 -10 950 600" role="img" aria-labelledby="what" font-family="system-ui, sans-serif">\n'
            f'<title id="what">Nano-MoE: {cfg.n_layers} blocks of attention and a mixture of {cfg.num_experts} experts, of which a token visits {cfg.top_k}</title>\n'
            f'<style>text{{fill:{INK};font-size:13px;text-anchor:middle}}.title{{font-size:16px;font-weight:600}}path{{fill:none;stroke:{GREY};stroke-width:2}}</style>\n'
            f'<defs><marker id="tip" viewBox="0 0 8 8" refX="6" refY="4" markerWidth="5" markerHeight="5" orient="auto"><path d="M0 0 L8 4 L0 8" style="fill:{GREY};stroke:none"/></marker></defs>\n')
    return head + "\n".join(parts) + "\n</svg>\n"


if __name__ == "__main__":
    target = root / "nbs" / "images" / "architecture.svg"
    target.parent.mkdir(exist_ok=True)
    target.write_text(architecture_svg(ModelConfig()), encoding="utf-8", newline="\n")
