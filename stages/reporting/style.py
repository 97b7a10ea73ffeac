"""How the report looks: light and dark as the reader's system is, on a phone, a desk and paper."""

STYLE = """
:root { color-scheme: light dark; --ink: light-dark(#16191d, #e8ebee); --page: light-dark(#fff, #15181c);
  --line: light-dark(#d8dce2, #3a3f47); --soft: light-dark(#f4f6f8, #1e2227); --quiet: light-dark(#57606a, #a3acb8);
  --good: light-dark(#1a7f37, #4cc26a); --bad: light-dark(#b42318, #ff8a7a); --warn: light-dark(#8a5a00, #e6b450);
  --link: light-dark(#0b57d0, #8ab4f8) }
* { box-sizing: border-box }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0; color: var(--ink); background: var(--page);
  overflow-wrap: break-word }
.skip { position: absolute; left: -100vw } .skip:focus { left: 1rem; top: 1rem; background: var(--page); padding:
  .5rem }
header, main { max-width: 76rem; margin: 0 auto; padding: 0 1.25rem }
header { padding-top: 1.5rem } header p { margin: 0; color: var(--quiet); font-size: .9rem }
a { color: var(--link) } :focus-visible { outline: 3px solid var(--link); outline-offset: 2px }
h1 { font-size: 1.1rem; margin: 0; font-weight: 600 } h2 { margin: 0 0 .8rem; font-size: 1.3rem }
h3 { margin: 1.6rem 0 .5rem; font-size: 1rem } section { margin: 2.2rem 0 }
.verdict { margin: 1rem 0 2rem; padding: 1.25rem 1.5rem; border: 1px solid var(--line); border-left: .5rem solid
  var(--tone);
  border-radius: .5rem; background: var(--soft) }
.promoted { --tone: var(--good) } .refused { --tone: var(--bad) } .inconclusive { --tone: var(--warn) }
.measured { --tone: var(--quiet) }
.verdict h2 { font-size: clamp(1.25rem, 1rem + 1vw, 1.6rem); line-height: 1.25; margin: .1rem 0 .6rem }
.badge { color: var(--tone); font-weight: 700; letter-spacing: .06em; text-transform: uppercase; font-size: .85rem;
  margin: 0 }
.verdict ul { margin: .4rem 0 0; padding-left: 1.2rem } .verdict li { margin: .2rem 0 }
.warnings { margin: 1rem 0; padding: .6rem 1rem; border: 1px solid var(--warn); border-radius: .4rem }
.warnings h3 { color: var(--warn) }
.headline { font-size: 1.15rem; font-weight: 650; margin: .6rem 0; font-variant-numeric: tabular-nums }
.verdict h3 { margin: 1rem 0 .4rem } .verdict .warnings h3 { margin: 0 }
.steps { display: grid; grid-template-columns: max-content 1fr; gap:
  .3rem 1.2rem; margin: 0 } .steps dd { margin: 0; overflow-wrap: anywhere }
figure { margin: 1rem 0 } figcaption, .quiet { color: var(--quiet); font-size: .875rem; max-width: 48rem }
figcaption { margin-top: .5rem }
.wide { display: inline-block; vertical-align: top; max-width: 100%; overflow-x: auto; border: 1px solid var(--line);
  border-radius: .4rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem }
th, td { padding: .4rem .6rem; text-align: right; white-space: nowrap; vertical-align: top; border-bottom: 1px solid
  var(--line) }
thead th { white-space: normal; vertical-align: bottom; background: var(--soft); min-width: 4.5rem }
tbody tr:last-child > * { border-bottom: 0 } tbody th { font-weight: 600; white-space: normal; min-width: 7.2rem;
  max-width: 18rem; overflow-wrap: anywhere }
.text { text-align: left } td.text { white-space: normal; min-width: 9rem }
svg { display: block; width: 100%; height: auto; max-width: 40rem } svg text { font-family: inherit }
pre, code { font: .82rem/1.5 ui-monospace, monospace } pre { background: var(--soft); padding: 1rem; overflow-x: auto;
  border-radius: .4rem; margin: .5rem 0 }
summary { cursor: pointer; padding: .35rem 0 } main { padding-bottom: 2rem }
.context { border: 1px solid var(--line); border-radius: .4rem; padding: .8rem 1rem; margin: 1rem 0 }
.context h3 { margin: 0 0 .5rem; font-size: .9rem; font-weight: 600 }
.context p { white-space: pre-wrap; overflow-wrap: anywhere; font: .9rem/1.9 ui-monospace, monospace; margin: 0 }
.context .around { color: var(--quiet) } .kept { border-bottom: 2px solid var(--good) }
del { color: var(--bad); text-decoration-thickness: 2px } del.dropped { opacity: .75; text-decoration-thickness: 1px }
.chosen { font-weight: 700; background: var(--soft); border: 1px solid var(--line); border-radius: .2rem; padding: 0
  .15rem }
@media (max-width: 40rem) { section { margin: 2.2rem 0 } .verdict { padding: 1rem } header, main {
  padding-inline: 1rem }
  .steps { grid-template-columns: 1fr } .steps dd { margin-bottom: .5rem } }
@media print { :root { color-scheme: light } body { font-size: 10.5pt } .skip { display: none }
  header, main { max-width: none; padding: 0 } section { margin: 1.4rem 0 } h2, h3 { break-after: avoid }
  figure, .context, .verdict, tr { break-inside: avoid } figure.table { break-inside: auto }
  .wide { overflow: visible; border: 0 } table { font-size: 7.5pt } th, td { padding: .15rem .3rem; white-space:
  normal !important; min-width: 0 !important; overflow-wrap: anywhere }
  .verdict, .context { background: none } pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: 7pt }
  details::details-content { content-visibility: visible; block-size: auto } }
""".strip()
