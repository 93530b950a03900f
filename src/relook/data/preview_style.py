"""The style sheet of the preview page, light and dark."""

STYLE = """
:root { color-scheme: light dark; --paper: #f6f7fa; --card: #fff; --ink: #181d2c; --soft: #626b80; --line: #dfe3ec;
  --user: #eef2f9; --model: #e7f4ec; --chip: #e3e6ef; --warn: #b02323; --warnbg: #fdecec; }
@media (prefers-color-scheme: dark) { :root { --paper: #12151d; --card: #1b1f2a; --ink: #e8ebf3; --soft: #98a1b5;
  --line: #313848; --user: #242a39; --model: #1d3328; --chip: #323a4d; --warn: #ff8f8f; --warnbg: #3c2024; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); 
  font: 15px/1.5 system-ui, "Liberation Sans", sans-serif; }
header, main { max-width: 1200px; margin: 0 auto; padding: 0 20px; }
h1 { font-size: 22px; margin: 24px 0 16px; overflow-wrap: anywhere; }
h2 { font-size: 15px; margin: 0 0 12px; } h2 small { color: var(--soft); font-weight: normal; margin-left: 6px; }
article { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 18px 20px 20px;
  margin-bottom: 20px; }
.item { display: grid; grid-template-columns: minmax(0, 3fr) minmax(0, 2fr); gap: 24px; align-items: start; }
@media (max-width: 760px) { .item { grid-template-columns: minmax(0, 1fr); } }
.pictures { display: flex; flex-wrap: wrap; gap: 16px; align-items: flex-start; }
figure { margin: 0; max-width: 100%; } figure.part { max-width: 320px; }
.frame { position: relative; display: inline-block; line-height: 0; max-width: 100%; border: 1px solid var(--line); }
.part .frame { border: 3px solid var(--c, var(--line)); }
img { display: block; width: auto; height: auto; max-width: 100%; }
.whole img { max-height: 560px; } .part img { max-height: 260px; }
svg { position: absolute; inset: 0; width: 100%; height: 100%; overflow: hidden; }
.grid { stroke: #4868aa; stroke-opacity: .35; fill: none; } .cells, .crop { fill: none; }
.grid, .cells, .crop { vector-effect: non-scaling-stroke; }
.cells { stroke-width: 1.5px; stroke-dasharray: 5 4; } .crop { stroke-width: 3px; }
.badge text { fill: #fff; text-anchor: middle; font-weight: bold; font-family: "Liberation Sans", sans-serif; }
figcaption { color: var(--soft); font-size: 12.5px; line-height: 1.35; margin-top: 5px; overflow-wrap: anywhere; }
figcaption b { color: var(--c, var(--ink)); }
.missing p { margin: 0; padding: 18px; border: 1px dashed var(--warn); color: var(--warn); overflow-wrap: anywhere; }
.turn { border-radius: 8px; padding: 8px 12px; margin-bottom: 8px; background: var(--user); }
.turn.assistant { background: var(--model); margin-left: 28px; }
.turn span { color: var(--soft); font-size: 12px; }
.turn p { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; max-height: 24em; overflow-y: auto; }
code { font: 12.5px/1.4 ui-monospace, "Liberation Mono", monospace; background: var(--chip); border-radius: 4px;
  padding: 1px 5px; margin: 0 2px 2px 0; display: inline-block; }
.none { color: var(--warn); }
.faults { margin: 0 0 14px; padding: 8px 14px 8px 30px; border-radius: 8px; background: var(--warnbg);
  color: var(--warn); overflow-wrap: anywhere; }
"""
