"""The report's page: a Jinja template, in a module so that a change of it changes the digest of the stage's code.

Everything is escaped: names of prompt sets, tokens and answers may be anybody's words.
"""

PAGE = """
{%- macro table(shown) %}
{%- if shown and shown.rows %}
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

{%- macro bullets(sentences) %}
{%- if sentences %}
<ul>{% for each in sentences %}<li>{{ each }}</li>{% endfor %}</ul>
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

{%- macro context(each) %}
<article class="context">
<h3>{{ "Typical" if each.kind == "typical" else "Worst" }}: acceptance length {{ "%.2f" | format(each.tau) }} over
{{ each.steps | length }} verify steps ({{ each.set }}, answer {{ each.trajectory_id[:16] }}, token
{{ each.position }})</h3>
<p><span class="around">{{ each.before }}</span>
{%- for step in each.steps %}
{%- if step.kept %}<span class="kept">{{ step.kept }}</span>{% endif %}
{%- if step.rejected %}<del title="proposed, rejected">{{ step.rejected | marked }}</del>{% endif %}
{%- if step.dropped %}<del class="dropped" title="proposed after it">{{ step.dropped | marked }}</del>{% endif %}
{%- if step.chosen %}<span class="chosen" title="the target's choice">{{ step.chosen | marked }}</span>{% endif %}
{%- endfor %}<span class="around">{{ each.after }}</span></p>
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
{%- if review %}
<section class="verdict {{ review.outcome.kind }}" aria-labelledby="verdict">
<p class="badge">{{ review.outcome.label }}</p>
<h2 id="verdict">{{ review.outcome.sentence }}</h2>
{%- if review.outcome.kind == "inconclusive" %}
<p>Nothing is broken: all drafters, answers and acceptance lengths are valid and kept.</p>
{%- endif %}
{%- if review.headline %}
<p class="headline">{{ review.headline }}</p>
{%- endif %}
{%- if spent %}
<p>{{ spent }}</p>
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
{%- endif %}

{%- call section("Drafters") %}
{{ table(tables.drafters) }}
{%- if review %}
<p class="quiet">Acceptance length: tokens per verify step, the target's own token included (+1). SGLang logs the same
as accept length, vLLM as mean acceptance length. Measured by replay of the same held-out answers for all drafters.</p>
{{ bullets(review.doubts) }}
{%- endif %}
{%- call fold("Acceptance by position in the block") %}{{ plot(plots.by_offset) }}{% endcall %}
{%- call fold("Speed by setting") %}{{ table(tables.by_setting) }}{% endcall %}
{%- call fold("Exactness") %}{{ bullets(review.exactness if review else []) }}{% endcall %}
{%- endcall %}

{%- call section("By prompt set") %}
{{ table(tables.by_set) }}
{%- endcall %}

{%- call section("Gate") %}
{{ table(tables.gate) }}
{%- if chosen %}
<p class="quiet">{{ chosen }}</p>
{%- endif %}
{%- endcall %}

{%- call section("Trend") %}
{{ plot(plots.trend, "Each drafter on the prompts of its own refresh, with 95 % intervals over prompts.") }}
{%- endcall %}

{%- call section("Contexts") %}
{%- if contexts %}
<p class="quiet">Stretches of held-out answers. <span class="kept">Accepted proposals</span> are underlined, a
<del>rejected proposal</del> and what was <del class="dropped">proposed after it</del> are struck out, and what the
<span class="chosen">target chose</span> instead is boxed. ␣ is a space, ⏎ a line break.</p>
{%- for each in contexts[:shown] %}
{{ context(each) }}
{%- endfor %}
{%- call fold("More contexts") %}{% for each in contexts[shown:] %}{{ context(each) }}{% endfor %}{% endcall %}
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
