"""How the page looks: light or dark as the reader's system is, in any script, on paper too."""

STYLE = """
:root {
  color-scheme: light dark;
  --page: #ffffff; --text: #1c2128; --quiet: #59626e; --line: #d5dae1; --panel: #f5f7f9;
  --trained: #0a5c2b; --trained-back: #d8f3df; --below: #6b4700; --below-back: #fdecc0;
  --above: #86128a; --above-back: #f9ddfa; --masked: #59626e; --dropped: #b3261e; --bar: #2f9e57;
  --warn-back: #fff4d6; --warn-line: #c98a00;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14171b; --text: #e3e7ec; --quiet: #9aa4b1; --line: #363d46; --panel: #1c2127;
    --trained: #8fe3a8; --trained-back: #123d23; --below: #f5d183; --below-back: #463307;
    --above: #f0a6f3; --above-back: #4b164d; --masked: #9aa4b1; --dropped: #ff8a80; --bar: #46b870;
    --warn-back: #33290f; --warn-line: #d9a429;
  }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 68rem; background: var(--page); color: var(--text);
  font: 1rem/1.55 system-ui, "Noto Sans", sans-serif; }
h1 { font-size: 1.6rem; margin: 0; line-height: 1.25; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .75rem; }
h3 { font-size: .95rem; margin: 1.5rem 0 .4rem; overflow-wrap: anywhere; }
p { margin: .4rem 0; }
.quiet { color: var(--quiet); font-weight: normal; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
caption { text-align: start; color: var(--quiet); padding-bottom: .3rem; }
th, td { padding: .25rem .8rem .25rem 0; text-align: end; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--quiet); font-weight: 600; white-space: nowrap; }
th:first-child, td:first-child, td.words { text-align: start; overflow-wrap: anywhere; }
td.bar { width: 22rem; padding-top: .55rem; }
td.bar span { display: block; height: .8rem; background: var(--bar); border-radius: 2px; min-width: 2px; }
.parts { display: flex; height: 1.1rem; margin: .6rem 0; border-radius: 3px; overflow: hidden; }
.trained { background: var(--bar); }
.masked { background: var(--quiet); }
.dropped { background: var(--dropped); }
.key { display: inline-block; width: .7rem; height: .7rem; border-radius: 2px; margin: 0 .4rem 0 1rem; }
.key:first-child { margin-inline-start: 0; }
.warnings { list-style: none; padding: 0; margin: 0; }
.warnings li { background: var(--warn-back); border-inline-start: 4px solid var(--warn-line); padding: .6rem .9rem;
  margin: .5rem 0; overflow-wrap: anywhere; }
pre { background: var(--panel); border: 1px solid var(--line); border-radius: 4px; padding: .8rem 1rem; margin: .3rem 0;
  white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: plaintext; text-align: start;
  font: .9rem/1.6 ui-monospace, "Noto Sans Mono", "Noto Sans Mono CJK SC", monospace; }
.m0 { color: var(--masked); }
.t1 { color: var(--trained); background: var(--trained-back); }
.lo { color: var(--below); background: var(--below-back); border-bottom: 2px dotted currentColor; }
.hi { color: var(--above); background: var(--above-back); border-bottom: 2px solid currentColor; }
.end { border: 1px solid currentColor; border-radius: 3px; padding: 0 .2em; font-size: .8em; }
.gap { color: var(--quiet); font-style: italic; display: block; }
.tokens { line-height: 2.2; unicode-bidi: normal; direction: ltr; }
.token { display: inline-block; white-space: pre; text-align: center; margin-inline-end: .35em; max-width: 100%;
  overflow: hidden; vertical-align: top; line-height: 1.35; }
.token bdi { display: block; min-height: 1.35em; }
.token small { display: block; color: var(--quiet); font-size: .7em; }
.start { border-inline-start: 3px solid var(--warn-line); padding-inline-start: .25em; }
.legend span { margin-inline-end: 1rem; padding: 0 .25em; }
footer { margin-top: 3rem; color: var(--quiet); font-size: .85rem; }
@media print { body { max-width: none; } .t1, .lo, .hi, .parts span, .key, td.bar span { print-color-adjust: exact; } }
"""
