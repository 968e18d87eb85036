"""The interactive charts of the page, drawn by bokeh; `page.js` gives them the page's colors."""

from __future__ import annotations

from typing import Any

from bokeh import models
from bokeh.embed import json_item
from bokeh.plotting import figure
from bokeh.resources import Resources

from reports.curves import Chart

# apart for color-blind eyes, readable on white and on black; dashes tell lines apart without colors
COLORS = ("#3d85c6", "#d9822b", "#2f9e75", "#c25a9a", "#8470cf", "#a8862a", "#5f9aa8", "#c9574c")
DASHES = ("solid", "dashed", "dotted", "dotdash")
FONT_SIZE = "0.8rem"
# marker, size, color of a point by whether its nearest neighbor is of its class
POINT_STYLES = {
    True: ("circle", 7, "#3d85c6"),
    False: ("x", 8, "#d9822b"),
    None: ("circle", 7, "#3d85c6"),
}
ALPHA = {"fill_alpha": 0.45, "line_alpha": 0.9, "nonselection_alpha": 0.12}
POINT_TIP = """<div style="width:112px;text-align:center;overflow-wrap:anywhere">
<img src="@picture" alt="" width="104" height="104"
style="object-fit:contain;display:block;margin:2px auto">
<div><b>@name</b></div><div>@note</div></div>"""


def bokeh_script() -> str:
    """Return BokehJS, to be put into the page."""
    return Resources(mode="inline", components=["bokeh"]).js_raw[0]


def style_of(number: int) -> tuple[str, str]:
    """Return color and dash of a chart's line."""
    return COLORS[number % len(COLORS)], DASHES[number // len(COLORS) % len(DASHES)]


def curve(chart: Chart) -> dict:
    """Return a chart of lines by epoch, as `Bokeh.embed.embed_item` takes it."""
    plot = _plot(sizing_mode="stretch_width", height=210, y_range=chart.limits())
    plot.toolbar_location = None
    plot.xaxis.axis_label = "epoch"
    plot.xaxis.ticker.min_interval = 1
    tips = [("", "@line"), ("epoch", "@epoch"), ("", "@value{0.[0000]}")]
    for number, line in enumerate(chart.lines):
        if not line.epochs:
            continue
        color, dash = style_of(number)
        labels = [line.label] * len(line.epochs)
        columns = {"epoch": line.epochs, "value": line.values, "line": labels}
        source = models.ColumnDataSource(columns)
        plot.line("epoch", "value", source=source, color=color, line_width=2, line_dash=dash)
        points = plot.scatter("epoch", "value", source=source, color=color, size=5)
        plot.add_tools(models.HoverTool(renderers=[points], tooltips=tips, mode="mouse"))
    return json_item(plot)


def scatter(
    columns: dict[str, list], right: list[bool | None], pictured: list[int], side: float
) -> dict:
    """Return the map of the embedding, as `Bokeh.embed.embed_item` takes it.

    Args:
        columns: for each point: x, y, picture (data URI), name, note, group (picked together).
        right: for each point whether its nearest neighbor is of its class; None without labels.
        pictured: the points whose pictures are drawn, `side` wide and high in units of x and y.
    """
    plot = _plot(sizing_mode="stretch_both", toolbar_location="above", match_aspect=True)
    plot.axis.visible = False
    plot.grid.visible = False
    marker, size, color = zip(*(POINT_STYLES[answer] for answer in right), strict=True)
    columns |= {"marker": marker, "size": size, "color": color}
    source = models.ColumnDataSource(columns, name="points")
    style = {"marker": "marker", "size": "size", "color": "color"}  # names of columns
    points = plot.scatter("x", "y", source=source, **style, **ALPHA)
    names = ("x", "y", "picture")
    some = {name: [columns[name][point] for point in pictured] for name in names}
    pictures = models.ColumnDataSource(some)
    plot.image_url("picture", "x", "y", side, side, anchor="center", source=pictures)
    plot.add_tools(models.PanTool(), models.WheelZoomTool(), models.BoxZoomTool())
    plot.add_tools(models.ResetTool(), models.TapTool(renderers=[points]))
    tip = models.HoverTool(renderers=[points], tooltips=POINT_TIP, attachment="horizontal")
    plot.add_tools(tip)
    return json_item(plot)


def _plot(**options: Any) -> figure:
    """Return an empty figure, which lets the page be scrolled until a tool is chosen."""
    plot = figure(tools="", active_drag=None, active_scroll=None, min_width=120, **options)
    plot.toolbar.logo = None
    plot.background_fill_color = None
    plot.border_fill_color = None
    plot.outline_line_color = None
    plot.axis.axis_label_text_font_size = FONT_SIZE
    plot.axis.major_label_text_font_size = FONT_SIZE
    plot.axis.axis_label_text_font_style = "normal"
    plot.axis.minor_tick_line_color = None
    return plot
