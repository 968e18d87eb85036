"""The interactive charts of the page, drawn by bokeh; their colours follow the page (`page.js`)."""

from __future__ import annotations

from bokeh.embed import json_item
from bokeh.models import BoxZoomTool, ColumnDataSource, HoverTool, PanTool, ResetTool, TapTool, WheelZoomTool
from bokeh.plotting import figure
from bokeh.resources import Resources

from reports.curves import Chart

# apart for colour-blind eyes, and readable on white as on black; dashes tell lines apart without colours
COLOURS = ("#3d85c6", "#d9822b", "#2f9e75", "#c25a9a", "#8470cf", "#a8862a", "#5f9aa8", "#c9574c")
DASHES = ("solid", "dashed", "dotted", "dotdash")
RIGHT, WRONG, PLAIN = "#3d85c6", "#d9822b", "#3d85c6"
FONT = "0.8rem"
POINT_TIP = """<div style="width:112px;text-align:center;overflow-wrap:anywhere">
<img src="@picture" alt="" width="104" height="104" style="object-fit:contain;display:block;margin:2px auto">
<div><b>@name</b></div><div>@note</div></div>"""


def bokeh_script() -> str:
    """BokehJS, to be put into the page."""
    return Resources(mode="inline", components=["bokeh"]).js_raw[0]


def style_of(number: int) -> tuple[str, str]:
    """Colour and dash of a chart's line."""
    return COLOURS[number % len(COLOURS)], DASHES[number // len(COLOURS) % len(DASHES)]


def curve(chart: Chart) -> dict:
    """A chart of lines by epoch, as what `Bokeh.embed.embed_item` takes."""
    plot = _plot(sizing_mode="stretch_width", height=210, toolbar_location=None, y_range=chart.limits())
    plot.xaxis.axis_label = "epoch"
    plot.xaxis.ticker.min_interval = 1
    for number, line in enumerate(chart.lines):
        if not line.epochs:
            continue
        colour, dash = style_of(number)
        source = ColumnDataSource({"epoch": line.epochs, "value": line.values, "line": [line.label] * len(line.epochs)})
        plot.line("epoch", "value", source=source, color=colour, line_width=2, line_dash=dash)
        points = plot.scatter("epoch", "value", source=source, color=colour, size=5)
        tips = [("", "@line"), ("epoch", "@epoch"), ("", "@value{0.[0000]}")]
        plot.add_tools(HoverTool(renderers=[points], tooltips=tips, mode="mouse"))
    return json_item(plot)


def scatter(columns: dict[str, list], labelled: bool) -> dict:
    """The map of the embedding, as what `Bokeh.embed.embed_item` takes.

    columns, a value for each point: x, y, picture (data URI), name, note, right (bool), group (picked together).
    """
    plot = _plot(sizing_mode="stretch_both", toolbar_location="above")
    plot.axis.visible = False
    plot.grid.visible = False
    columns = dict(columns)
    right = columns["right"]
    columns["marker"] = ["circle" if r or not labelled else "x" for r in right]
    columns["size"] = [7 if r or not labelled else 8 for r in right]
    columns["colour"] = [(RIGHT if r else WRONG) if labelled else PLAIN for r in right]
    source = ColumnDataSource(columns, name="points")
    points = plot.scatter("x", "y", source=source, marker="marker", size="size", color="colour", fill_alpha=0.45,
                          line_alpha=0.9, nonselection_alpha=0.12, selection_line_width=2)  # fmt: skip
    pan, zoom, box = PanTool(), WheelZoomTool(), BoxZoomTool()
    plot.add_tools(pan, zoom, box, ResetTool(), TapTool(renderers=[points]))
    plot.add_tools(HoverTool(renderers=[points], tooltips=POINT_TIP, attachment="horizontal"))
    return json_item(plot)


def _plot(**options):
    """An empty figure; nothing is dragged until a tool is chosen, so that the page can be scrolled."""
    plot = figure(tools="", active_drag=None, active_scroll=None, active_inspect="auto",
                  min_width=120, output_backend="canvas", **options)  # fmt: skip
    plot.toolbar.logo = None
    plot.background_fill_color = plot.border_fill_color = plot.outline_line_color = None
    plot.axis.axis_label_text_font_size = plot.axis.major_label_text_font_size = FONT
    plot.axis.axis_label_text_font_style = "normal"
    plot.axis.minor_tick_line_color = None
    plot.min_border_left = plot.min_border_right = 8
    return plot
