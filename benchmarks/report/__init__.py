"""``python -m benchmarks report``: one HTML page, and a Markdown summary, of whatever results there are.

`sources` reads files of results, `suite` lists what the page can show of each benchmark, one file a benchmark says how
(`quality`, `million`, `memory`, ...), `page` puts it together as HTML and as Markdown. Nothing here is measured, and no
figure is typed: all that is said comes from the rows.
"""
