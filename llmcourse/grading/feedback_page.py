"""The feedback page as a Jinja template: readable in light and dark, on a phone and on paper."""

TEMPLATE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{{ policy }}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<meta name="results" content="{{ stamp }}">
<title>{{ score.student }} · {{ lab }}</title>
<style>
:root { color-scheme: light dark; --page: #f6f7f9; --card: #fff; --line: #d9dde3; --text: #1c2330;
        --soft: #5b6677; --good: #1a7f4b; --bad: #b3362b;
        --wait: #8a6100; --accent: #0072b2; --well: #f3f5f8 }
@media (prefers-color-scheme: dark) {
  :root { --page: #12161d; --card: #1a2029; --line: #303a48; --text: #e4e9f0; --soft: #9aa7b8;
          --good: #55c98a; --bad: #ff8a7d; --wait: #e5b84b; --accent: #56b4e9; --well: #131922 }
}
* { box-sizing: border-box }
body { margin: 0; background: var(--page); color: var(--text); font: 16px/1.55 system-ui, sans-serif }
main { max-width: 60rem; margin: 0 auto; padding: 2.2rem 1.1rem 4rem }
h1 { font-size: 1.55rem; line-height: 1.25; margin: 0 } h2 { font-size: 1.15rem; margin: 0 }
.soft { color: var(--soft) } .name { font-family: ui-monospace, monospace; font-size: .85em }
header { display: flex; gap: 1.2rem; justify-content: space-between; align-items: end; flex-wrap: wrap }
.total { font-size: 2.1rem; font-weight: 650; line-height: 1; font-variant-numeric: tabular-nums }
.total small { font-size: 1rem; font-weight: 400; color: var(--soft) }
.bar { height: .45rem; border-radius: 1rem; background: var(--line); overflow: hidden; margin: 1rem 0 1.6rem }
.bar div { height: 100%; background: var(--accent); border-radius: 1rem }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; margin: 1.1rem 0;
        padding: 1.05rem 1.2rem; overflow: hidden }
table { border-collapse: collapse; width: 100% }
th, td { text-align: left; padding: .38rem .5rem .38rem 0; border-bottom: 1px solid var(--line) }
tr:last-child td { border-bottom: 0 } th { font-weight: 500; color: var(--soft); font-size: .88rem }
.n { text-align: right; padding-right: 0; font-variant-numeric: tabular-nums; white-space: nowrap }
td a { color: inherit; text-decoration-color: var(--line); text-underline-offset: .2em }
.head { display: flex; justify-content: space-between; gap: 1rem; align-items: baseline }
.tag { font-size: .82rem; font-weight: 600; white-space: nowrap }
.passed, .marked { color: var(--good) } .failed { color: var(--bad) } .open, .waits { color: var(--wait) }
pre { margin: 0; font: 13.5px/1.5 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere }
.verdict { border-left: 4px solid; padding: .15rem 0 .15rem .9rem; margin: .9rem 0 0 }
.verdict pre { color: var(--text) }
.well { background: var(--well); border: 1px solid var(--line); border-radius: 7px;
        padding: .7rem .9rem; margin-top: .8rem }
.out { margin: .8rem 0 0; padding-left: .9rem; border-left: 2px solid var(--line);
       max-height: 26rem; overflow: auto }
.out pre { color: var(--soft) } img { max-width: 100%; height: auto; background: #fff }
.note { border-left: 4px solid var(--accent); padding-left: .9rem; margin-top: .9rem; white-space: pre-wrap }
.answer > :first-child { margin-top: 0 } .answer > :last-child { margin-bottom: 0 }
ul { margin: .4rem 0 0; padding-left: 1.2rem }
@media print { body { background: none } .card { break-inside: avoid } .out { max-height: none } }
{{ code_style }}
</style>
</head>
<body>
<main>
<header>
<div><h1>{{ title }}</h1>
<div class="soft">{{ score.student }} · <span class="name">{{ lab }}</span></div></div>
<div class="total">{{ number(score.points) }}<small> of {{ number(score.max) }} points</small></div>
</header>
<div class="bar" role="img" aria-label="{{ share }} percent"><div style="width: {{ share }}%"></div></div>
{% if remarks or waits %}
<section class="card"><h2>Please note</h2><ul>
{% for remark in remarks %}
<li>{{ remark }}</li>
{% endfor %}
{% if waits %}
<li>An answer waits for your instructor: the points are not final.</li>
{% endif %}
</ul></section>
{% endif %}
<section class="card"><table>
<thead><tr><th>Exercise</th><th>Result</th><th class="n">Points</th></tr></thead><tbody>
{% for s in sections %}
<tr><td><a href="#{{ s.name }}">{{ s.title }}</a></td>
<td class="tag {{ s.state }}">{{ labels.get(s.state, s.state) }}</td>
<td class="n">{{ number(s.mark.points) }} / {{ number(s.mark.max) }}</td></tr>
{% endfor %}
</tbody></table></section>
{% for s in sections %}
<section class="card" id="{{ s.name }}">
<div class="head"><h2>{{ s.title }}
{% if s.title != s.name %}<span class="name soft">{{ s.name }}</span>{% endif %}</h2>
<span class="tag {{ s.state }}">{{ number(s.mark.points) }} / {{ number(s.mark.max) }}</span></div>
{% if s.verdict %}
<div class="verdict {{ s.state }}"><pre>{{ s.verdict }}</pre></div>
{% endif %}
{% if s.mark.comment %}
<div class="note"><b>Your instructor:</b> {{ s.mark.comment }}</div>
{% endif %}
{% if s.mark.manual is not none and not s.mark.by_hand %}
<p class="soft">Points given by your instructor; the checks gave {{ number(s.mark.auto or 0) }}.</p>
{% endif %}
{% if s.mark.extra %}
<p class="soft">{{ number(s.mark.extra) }} extra points are among them.</p>
{% endif %}
{% for part in s.parts %}
{% if part.kind == "code" %}
<div class="well">{{ part.content }}</div>
{% elif part.kind == "answer" %}
<div class="well answer">{{ part.content }}</div>
{% elif part.kind == "plain" %}
<div class="well"><pre>{{ part.content }}</pre></div>
{% elif part.kind == "picture" %}
<p><img alt="a picture from your notebook" src="data:image/png;base64,{{ part.content }}"></p>
{% else %}
<div class="out"><pre>{{ part.content }}</pre></div>
{% endif %}
{% endfor %}
</section>
{% endfor %}
<p class="soft">Your code as it was graded. The checks ran on fresh random inputs.</p>
</main>
</body>
</html>
"""
