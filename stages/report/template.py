"""The report's page: a Jinja template in a module, so that a change changes the digest of the stage's code.

Everything is escaped: names of slices, tokens and answers come from outside.
"""

PAGE = """
{%- macro table(shown) %}
{%- if shown.rows %}
<figure class="table">
<div class="wide" role="region" aria-label="{{ shown.title }}" tabindex="0"><table>
<thead><tr>
{%- for cell in shown.head %}
<th scope="col"{% if loop.index0 < shown.text_columns %} class="text"{% endif %}>{{ cell }}</th>
{%- endfor %}</tr></thead>
<tbody>
{%- for row in shown.rows %}
<tr>
{%- for cell in row %}
{%- set tag = "td" if loop.index0 else "th" %}<{{ tag }}{% if loop.first %} scope="row"{% endif %}
{%- if loop.index0 < shown.text_columns %} class="text"{% endif %}>
{%- for line in cell.split("\\n") %}{{ line }}{% if not loop.last %}<br>{% endif %}{% endfor %}</{{ tag }}>
{%- endfor %}</tr>
{%- endfor %}
</tbody>
</table></div>
{%- if shown.caption %}
<figcaption>{{ shown.caption }}</figcaption>
{%- endif %}
</figure>
{%- endif %}
{%- endmacro %}

{%- macro plot(svg, caption="") %}
{%- if svg %}
<figure>
{{ svg | safe }}
{%- if caption %}
<figcaption>{{ caption }}</figcaption>
{%- endif %}
</figure>
{%- endif %}
{%- endmacro %}

{%- macro sentence(text) %}
{%- if text %}
<p>{{ text }}</p>
{%- endif %}
{%- endmacro %}

{%- macro bullets(sentences) %}
{%- if sentences %}
<ul>{% for sentence in sentences %}<li>{{ sentence }}</li>{% endfor %}</ul>
{%- endif %}
{%- endmacro %}

{%- macro section(title) %}
{%- set id = title | lower | replace(" ", "-") %}
{%- set body = caller() %}
{%- if body | trim %}
<section id="{{ id }}" aria-labelledby="{{ id }}-title">
<h2 id="{{ id }}-title">{{ title }}</h2>
{{ body }}
</section>
{%- endif %}
{%- endmacro %}

{%- macro fold(title) %}
{%- set body = caller() %}
{%- if body | trim %}
<details>
<summary>{{ title }}</summary>
{{ body }}
</details>
{%- endif %}
{%- endmacro %}

{%- macro context(example) %}
<article class="context">
<h3>{{ "Typical" if example.kind == "typical" else "Worst" }}: acceptance length {{ "%.2f" | format(example.tau) }} over
{{ example.steps | length }} verify steps ({{ example.set }}, answer {{ example.trajectory_id[:16] }}, token
{{ example.position }})</h3>
<p><span class="around">{{ example.before }}</span>
{%- for step in example.steps %}
{%- if step.accepted %}<span class="kept">{{ step.accepted }}</span>{% endif %}
{%- if step.rejected %}<del title="proposed, rejected">{{ step.rejected | marked }}</del>{% endif %}
{%- if step.dropped %}<del class="dropped" title="proposed after it">{{ step.dropped | marked }}</del>{% endif %}
{%- if step.chosen %}<span class="chosen" title="the target's choice">{{ step.chosen | marked }}</span>{% endif %}
{%- endfor %}<span class="around">{{ example.after }}</span></p>
</article>
{%- endmacro -%}

<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{{ title }}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<style>
{{ style | safe }}
</style>
</head>
<body>
<a class="skip" href="#report">Skip to the verdict</a>
<header>
<h1>{{ title }}</h1>
<p>
{%- for name, value in facts.items() if value %}{{ name }} {{ value }}{% if not loop.last %} · {% endif %}{% endfor -%}
</p>
</header>
<main id="report" tabindex="-1">
<section class="verdict {{ review.outcome.kind }}" aria-labelledby="verdict">
<p class="badge">{{ review.outcome.label }}</p>
<h2 id="verdict">{{ review.outcome.sentence }}</h2>
{%- if review.outcome.kind == "inconclusive" %}
<p>Nothing is broken: all drafters, answers and acceptance lengths are valid and kept.</p>
{%- endif %}
{%- if review.headline %}
<p class="headline">{{ review.headline }}</p>
{%- endif %}
{%- if cost %}
<p>{{ cost }}</p>
{%- endif %}
{%- if warnings %}
<div class="warnings" role="note">
<h3>Warnings</h3>
{{ bullets(warnings) }}
</div>
{%- endif %}
{%- if steps %}
<h3>What to do</h3>
<dl class="steps">
{%- for step in steps %}
<dt>{{ step.label }}</dt><dd><code>{{ step.command }}</code></dd>
{%- endfor %}
</dl>
{%- endif %}
</section>

{%- call section("Drafters") %}
{{ table(tables.drafters) }}
<p class="quiet">Acceptance length: tokens per verify step, with the target's own token (+1). SGLang logs it
as accept length, vLLM as mean acceptance length. Measured by {% if as_served -%}
the verify steps that servers counted on the same held-out prompts for all drafters
{%- else %}replay of the same held-out answers for all drafters{% endif %}.</p>
{{ bullets(review.speed_warnings) }}
{%- call fold("Acceptance by position in the block") %}
{{ plot(plots.by_offset) }}{{ sentence(single.by_offset) }}
{%- endcall %}
{%- call fold("Confidence") %}{{ table(tables.confidence) }}{% endcall %}
{%- call fold("Speed by setting") %}{{ table(tables.by_setting) }}{% endcall %}
{%- call fold("Exactness") %}{{ bullets(review.exactness) }}{% endcall %}
{%- endcall %}

{%- call section("Speed by load") %}
{{ sentence(single.by_load) }}
{{ plot(plots.by_load, ("Measured" if measured_loads else "Predicted, each drafter at its fastest block size") +
", with 95 % intervals.") }}
{%- call fold("Table") %}{{ table(tables.by_load) }}{% endcall %}
{%- endcall %}

{%- call section("By slice") %}
{{ plot(plots.by_slice, "95 % intervals hold for all slices together. Dashed: the loss that the gate allows.") }}
{{ plot(plots.tau_by_slice, "With 95 % intervals of each single slice; none if a slice is too small.") }}
{{ table(tables.by_slice) }}
{%- call fold("Acceptance by offset and slice") %}{{ table(tables.by_offset) }}{% endcall %}
{%- endcall %}

{%- call section("Gate") %}
{{ table(tables.gate) }}
{%- if choice %}
<p class="quiet">{{ choice }}</p>
{%- endif %}
{%- endcall %}

{%- call section("Trend") %}
{{ plot(plots.trend, "Each drafter on the prompts of its refresh, with 95 % intervals over prompts.") }}
{%- endcall %}

{%- call section("Contexts") %}
{%- if contexts %}
<p class="quiet">Stretches of held-out answers. <span class="kept">Accepted proposals</span> are underlined, a
<del>rejected proposal</del> and the <del class="dropped">proposals after it</del> are struck out, and the
<span class="chosen">target's choice</span> is boxed. ␣ is a space, ⏎ a line break.</p>
{%- for example in contexts[:shown] %}
{{ context(example) }}
{%- endfor %}
{%- call fold("More contexts") %}{% for example in contexts[shown:] %}{{ context(example) }}{% endfor %}{% endcall %}
{%- call fold("Worst contexts of each slice") %}
{%- for name, worst in contexts_by_slice %}
<h3>{{ name }}</h3>
{%- for example in worst %}{{ context(example) }}{% endfor %}
{%- endfor %}
{%- endcall %}
{%- endif %}
{%- endcall %}

{%- call section("Details") %}
{%- call fold("Data") %}{% if data %}<pre tabindex="0">{{ data }}</pre>{% endif %}{% endcall %}
{%- call fold("Stages and lineage") %}{{ table(tables.stages) }}{% endcall %}
{%- call fold("All settings") %}{% if config %}<pre tabindex="0">{{ config }}</pre>{% endif %}{% endcall %}
{%- endcall %}
</main>
</body>
</html>
"""

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
