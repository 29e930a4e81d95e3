"""How a report looks, beside what all pages share. Every colour of text and of curves keeps its contrast of 4.5."""

STYLE = """
:root {
  --c0: #1d5fbf; --c1: #b04a00; --c2: #0a7a3d; --c3: #86128a; --c4: #59626e; --c5: #a3123f; --c6: #00707a;
  --c7: #6b5200; --good: #0a6b35; --bad: #b3261e; --link: #1d5fbf; --card: #f5f7f9;
}
@media (prefers-color-scheme: dark) {
  :root {
    --c0: #7db5ff; --c1: #f5a65b; --c2: #6fd394; --c3: #eda6f0; --c4: #aab3bf; --c5: #ff8fa9; --c6: #62d0da;
    --c7: #dcc266; --good: #7fdba0; --bad: #ff8a80; --link: #7db5ff; --card: #1c2127;
  }
}
html { scroll-behavior: smooth; scroll-padding-top: 1rem; }
@media (prefers-reduced-motion: reduce) { html { scroll-behavior: auto; } }
body { max-width: 64rem; }
header h1 { overflow-wrap: anywhere; }
a { color: var(--link); text-underline-offset: .15em; }
a:focus-visible, summary:focus-visible, pre:focus-visible, .wide:focus-visible { outline: 3px solid var(--link);
  outline-offset: 2px; border-radius: 3px; }
.skip { position: absolute; left: -999rem; }
.skip:focus { position: static; }
.state { display: inline-block; border: 1px solid currentColor; border-radius: 1rem; padding: .05rem .7rem;
  font-size: .85rem; font-weight: 600; margin-inline-end: .5rem; }
.state.finished { color: var(--good); }
nav ul { list-style: none; display: flex; flex-wrap: wrap; gap: .3rem 1.1rem; padding: 0; margin: 1rem 0 0;
  font-size: .9rem; }
nav a { display: inline-block; padding: .15rem 0; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(16rem, 1fr)); gap: .8rem; margin: 1.5rem 0 0;
  padding: 0; }
.figures > div { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .8rem 1rem; }
.figures dt { color: var(--quiet); font-size: .85rem; }
.figures dd { margin: 0; }
.figures .value { font-size: 1.45rem; font-weight: 600; font-variant-numeric: tabular-nums; line-height: 1.3; }
.figures .quiet { font-size: .85rem; }
.findings { padding-inline-start: 1.2rem; margin: .5rem 0; max-width: 46rem; }
.findings li { margin: .35rem 0; }
.good { color: var(--good); font-weight: 600; }
.bad { color: var(--bad); font-weight: 600; }
section > p, .note { max-width: 46rem; }
.note { color: var(--quiet); font-size: .88rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(25rem, 100%), 1fr)); gap: 1rem; }
.chart { margin: 1rem 0; border: 1px solid var(--line); border-radius: 8px; padding: .9rem 1rem .7rem; min-width: 0; }
.charts .chart { margin: 0; }
.chart h3 { margin: 0 0 .2rem; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .1rem 1.2rem; padding: 0; margin: .2rem 0 .5rem;
  font-size: .85rem; }
.legend li { overflow-wrap: anywhere; }
.sample { width: 34px; height: 10px; margin-inline-end: .4rem; vertical-align: middle; }
.axis { color: var(--quiet); font-size: .78rem; margin: 0 0 .45rem; }
.end-of-axis { text-align: end; margin: .1rem 0 .3rem; }
.frame { display: grid; grid-template-columns: 3.2rem minmax(0, 1fr); grid-template-rows: 16rem 1.5rem; }
.charts .frame { grid-template-rows: 10rem 1.5rem; }
.plot { width: 100%; height: 100%; display: block; border-inline-start: 1px solid var(--line); overflow: visible; }
.plot path, .sample path { fill: none; vector-effect: non-scaling-stroke; stroke-linecap: round;
  stroke-linejoin: round; }
.plot .grid { stroke: var(--line); stroke-width: 1; }
.line { stroke-width: 2; }
.plot .faint { stroke-width: 1; opacity: .55; }
.sample .faint { stroke-width: 1; }
.plot .band { stroke: none; opacity: .2; }
.plot .mark { stroke-width: 8; stroke-dasharray: none; }
.values { position: relative; grid-row: 1; }
.values span { position: absolute; right: .5rem; transform: translateY(-50%); white-space: nowrap; }
.places { position: relative; grid-column: 2; }
.places span { position: absolute; top: .25rem; transform: translateX(-50%); white-space: nowrap; }
.places .last { transform: translateX(-85%); }
.values, .places { color: var(--quiet); font-size: .78rem; font-variant-numeric: tabular-nums; }
.c0 { stroke: var(--c0); } .c1 { stroke: var(--c1); } .c2 { stroke: var(--c2); } .c3 { stroke: var(--c3); }
.c4 { stroke: var(--c4); } .c5 { stroke: var(--c5); } .c6 { stroke: var(--c6); } .c7 { stroke: var(--c7); }
.plot .band.c0 { fill: var(--c0); } .plot .band.c1 { fill: var(--c1); } .plot .band.c2 { fill: var(--c2); }
.plot .band.c3 { fill: var(--c3); } .plot .band.c4 { fill: var(--c4); }
.line.c1 { stroke-dasharray: 8 5; } .line.c2 { stroke-dasharray: 2 5; } .line.c3 { stroke-dasharray: 12 4 2 4; }
.line.c5 { stroke-dasharray: 5 3; } .line.c6 { stroke-dasharray: 14 5; } .line.c7 { stroke-dasharray: 8 4 2 4 2 4; }
details { margin: .5rem 0; }
summary { cursor: pointer; color: var(--link); font-size: .88rem; padding: .15rem 0; width: fit-content; }
.sampled { border: 1px solid var(--line); border-radius: 8px; padding: .2rem 1rem 1rem; margin: 1rem 0; }
.sides { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(18rem, 100%), 1fr)); gap: .8rem; }
.sides h4, .sampled h4 { margin: .6rem 0 .2rem; font-size: .85rem; color: var(--quiet); }
.sides > div { min-width: 0; }
.sides p { font-size: .88rem; }
pre { overflow-x: auto; }
pre.command { border-inline-start: 4px solid var(--link); }
code { font-family: ui-monospace, "Noto Sans Mono", monospace; font-size: .92em; overflow-wrap: anywhere; }
.facts th, .facts td { text-align: start; white-space: normal; overflow-wrap: anywhere; }
.facts td:last-child { overflow-wrap: anywhere; }
@media (max-width: 40rem) {
  body { padding: 1.2rem .9rem 3rem; }
  .chart { padding: .8rem .7rem .5rem; }
  .frame { grid-template-columns: 2.7rem minmax(0, 1fr); grid-template-rows: 12rem 1.5rem; }
  .places .first, .places.crowded .second { display: none; }
  .figures { grid-template-columns: repeat(auto-fit, minmax(min(9.5rem, 100%), 1fr)); }
  .figures .value { font-size: 1.2rem; }
}
@media (max-width: 64rem) { .places.crowded .first { display: none; } }
@media print {
  body { padding: 0; font-size: 10pt; }
  nav, .skip { display: none; }
  .chart, .sampled, .figures > div { break-inside: avoid; }
  .plot path, .sample path { print-color-adjust: exact; }
}
"""
