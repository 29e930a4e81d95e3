"""How the page looks, beside what all pages share: colours of weights, tokens with their ids, histograms."""

STYLE = """
:root {
  --trained: #0a5c2b; --trained-back: #d8f3df; --below: #6b4700; --below-back: #fdecc0;
  --above: #86128a; --above-back: #f9ddfa; --masked: #59626e;
}
@media (prefers-color-scheme: dark) {
  :root {
    --trained: #8fe3a8; --trained-back: #123d23; --below: #f5d183; --below-back: #463307;
    --above: #f0a6f3; --above-back: #4b164d; --masked: #9aa4b1;
  }
}
td.bar { width: 22rem; padding-top: .55rem; }
td.bar span { display: block; height: .8rem; background: var(--bar); border-radius: 2px; min-width: 2px; }
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
@media print { .t1, .lo, .hi, td.bar span { print-color-adjust: exact; } }
"""
