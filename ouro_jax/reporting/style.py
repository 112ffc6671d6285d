"""The look of the report: one style sheet, two themes, no scripts and nothing from outside."""

# Loops run from warm and shallow to cool and deep, at about equal lightness within a theme.
CSS = """
:root {
  color-scheme: light dark;
  --paper: #fbfaf7; --card: #ffffff; --ink: #1d2024; --faint: #686d76; --line: #dddbd4;
  --band: #f2f0ea; --accent: #2f5fb3; --good: #2e7d4f;
  --loop-1: #d9982b; --loop-2: #dd6b39; --loop-3: #c93e5f; --loop-4: #8f3f97;
  --loop-5: #5a4fb8; --loop-6: #2f74c0; --loop-7: #1a929b; --loop-8: #3d8f57;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #15171b; --card: #1c1f24; --ink: #e8e6e1; --faint: #9a9ea8; --line: #363a42;
    --band: #22262c; --accent: #86abf2; --good: #7cc795;
    --loop-1: #f0b75a; --loop-2: #f28f5e; --loop-3: #ee6f8a; --loop-4: #c47fd0;
    --loop-5: #978cf0; --loop-6: #6aa9f0; --loop-7: #55c4cb; --loop-8: #7cc795;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.6 ui-sans-serif, system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans",
    "DejaVu Sans", sans-serif;
  -webkit-text-size-adjust: 100%;
}
main { max-width: 1040px; margin: 0 auto; padding: 56px 40px 72px; }
h1, h2 {
  font-family: "Iowan Old Style", "Palatino Linotype", Palatino, "Book Antiqua", Georgia,
    "DejaVu Serif", serif;
  font-weight: 600; line-height: 1.2; letter-spacing: -0.01em;
}
h1 { font-size: 40px; margin: 0 0 8px; overflow-wrap: anywhere; }
h2 { font-size: 25px; margin: 64px 0 6px; }
h3 { font-size: 15px; margin: 24px 0 4px; }
p { margin: 0 0 12px; max-width: 68ch; }
.kicker {
  margin: 0 0 10px; font-size: 13px; letter-spacing: 0.08em; text-transform: uppercase;
  color: var(--faint);
}
.lead { font-size: 18px; }
.note, figcaption, .missing { color: var(--faint); font-size: 15px; }
.missing { border-left: 3px solid var(--line); padding-left: 14px; }
dl.facts {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(165px, 1fr)); gap: 1px;
  margin: 28px 0 0; background: var(--line); border: 1px solid var(--line);
  border-radius: 10px; overflow: hidden;
}
dl.facts + p { margin-top: 16px; }
dl.facts div { background: var(--card); padding: 14px 18px; }
dl.facts dt { font-size: 13px; color: var(--faint); }
dl.facts dd {
  margin: 0; font-size: 20px; font-weight: 600; font-variant-numeric: tabular-nums;
}
dl.facts small { display: block; font-size: 13px; font-weight: 400; color: var(--faint); }
.verdict { list-style: none; margin: 20px 0 24px; padding: 0; }
.verdict li {
  border-left: 3px solid var(--accent); padding: 2px 0 2px 14px; margin: 0 0 10px;
  max-width: 68ch;
}
.scroll { overflow-x: auto; }
.scroll + p { margin-top: 16px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 7px 10px; text-align: right; white-space: nowrap; font-size: 15px; }
th { font-weight: 500; font-size: 13px; color: var(--faint); border-bottom: 1px solid var(--line); }
td { border-bottom: 1px solid var(--line); }
th:first-child, td:first-child, td.text, th.text { text-align: left; padding-left: 2px; }
td.long { white-space: normal; overflow-wrap: anywhere; min-width: 24ch; }
tr.mean td { font-weight: 600; border-bottom: 0; border-top: 1px solid var(--faint); }
.trained { background: var(--band); font-weight: 600; }
th.trained { color: var(--ink); }
.beyond { color: var(--faint); font-style: italic; }
th.baseline, td.baseline { border-left: 1px solid var(--line); }
details { margin: 16px 0 0; }
summary { cursor: pointer; color: var(--accent); font-size: 15px; }
figure { margin: 18px 0 0; }
/* A picture has the light theme's colours for good, so in the dark it is a card. */
figure img { display: block; max-width: 100%; height: auto; border-radius: 10px; }
figure svg { display: block; width: 100%; height: auto; }
figure svg text { font-family: inherit !important; }
svg.narrow { display: none !important; }
figcaption { margin: 8px 0 0; max-width: 68ch; }
.sample {
  background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 16px 18px; margin: 12px 0 24px; overflow-x: auto;
  font: 14px/1.9 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  white-space: pre-wrap; overflow-wrap: anywhere;
}
.sample .prompt { color: var(--faint); }
.token, .key i {
  background: color-mix(in srgb, var(--loop) 22%, transparent);
  border-bottom: 2px solid var(--loop);
}
.token { padding: 2px 0 1px; margin-right: 1px; border-radius: 2px 2px 0 0; }
.token:hover { background: color-mix(in srgb, var(--loop) 50%, transparent); }
.key {
  display: flex; flex-wrap: wrap; gap: 4px 20px; margin: 14px 0; padding: 0; font-size: 14px;
}
.key li { list-style: none; font-variant-numeric: tabular-nums; }
.key i {
  display: inline-block; width: 22px; height: 16px; margin-right: 7px; vertical-align: -3px;
}
.loop-1 { --loop: var(--loop-1); } .loop-2 { --loop: var(--loop-2); }
.loop-3 { --loop: var(--loop-3); } .loop-4 { --loop: var(--loop-4); }
.loop-5 { --loop: var(--loop-5); } .loop-6 { --loop: var(--loop-6); }
.loop-7 { --loop: var(--loop-7); } .loop-8 { --loop: var(--loop-8); }
article { border-top: 1px solid var(--line); margin-top: 72px; }
article > section:first-child h2 { margin-top: 28px; }
article > section + section h2 { font-size: 19px; margin-top: 36px; }
a { color: var(--accent); }
footer { margin-top: 64px; color: var(--faint); font-size: 14px; }
@media (max-width: 720px) {
  main { padding: 28px 16px 48px; }
  h1 { font-size: 30px; }
  h2 { font-size: 22px; margin-top: 48px; }
  dl.facts { grid-template-columns: 1fr 1fr; }
  dl.facts div { padding: 10px 12px; }
  dl.facts div:last-child:nth-child(odd) { grid-column: span 2; }
  dl.facts dd { font-size: 17px; }
  th, td { padding: 6px 7px; font-size: 14px; }
  th:first-child, td:first-child { position: sticky; left: 0; background: var(--paper); }
  svg.wide { display: none !important; }
  svg.narrow { display: block !important; }
}
@media print { details { display: block; } .sample, figure { break-inside: avoid; } }
"""
