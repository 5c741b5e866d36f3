"""The style of the runs' pages, on top of ``page.STYLE``."""

LOOK = """
.verdict { font-size: 17px; color: var(--ink); max-width: 90ch; padding: 12px 16px; border-radius: 10px;
  background: var(--card); border: 1px solid var(--line); border-left: 5px solid var(--faint); }
.verdict.better { border-left-color: var(--right); }
.verdict.worse { border-left-color: var(--wrong); }
.facts { display: flex; flex-wrap: wrap; gap: 6px 22px; color: var(--faint); font-size: 14px; }
.facts b { font-weight: 600; color: var(--ink); margin-right: 3px; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 520px), 1fr)); gap: 14px; }
figure { margin: 0; min-width: 0; }
figure.plot { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 12px; }
figure.plot img { width: 100%; display: block; border-radius: 4px; background: #fff; }
figcaption { font-size: 13px; color: var(--faint); margin-top: 6px; line-height: 1.4; overflow-wrap: anywhere; }
.sheet { max-width: 100%; border: 1px solid var(--line); border-radius: 6px; background: #fff; display: block; }
.row { display: flex; flex-wrap: wrap; gap: 14px; align-items: flex-start; }
.row article, .row figure { min-width: 0; }
.prompt { margin-top: 14px; }
.videos { display: flex; flex-wrap: wrap; gap: 10px; }
.videos figure { width: 168px; }
.videos video { width: 100%; display: block; border-radius: 6px; background: #000; }
.videos video.small { image-rendering: pixelated; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; }
table.long td { white-space: normal; min-width: 9ch; overflow-wrap: anywhere; }
table.bars { border: 0; width: 100%; min-width: 260px; }
.bar { background: linear-gradient(to right, var(--bar) var(--share), transparent 0); padding: 1px 8px;
  border-radius: 4px; min-width: 150px; }
.best { color: var(--right); font-weight: 600; }
.swatch { display: inline-block; width: 11px; height: 11px; border-radius: 3px; margin-right: 7px; }
@media (prefers-color-scheme: dark) {
  figure.plot img, .swatch { filter: invert(0.88) hue-rotate(180deg); }
}
@media (max-width: 640px) {
  main { padding: 20px 12px 48px; }
  h1 { font-size: 23px; }
  h2 { margin-top: 34px; }
  th, td { padding: 5px 8px; }
}
"""
