"""The shapes that the dashboards are made of: variables, queries, and a function for each kind of panel.

Built with Grafana's own types (grafana-foundation-sdk), in the classic JSON that every Grafana from 10 on reads from a file; no plugin is
needed. Every panel's text says what to do about what it shows.
"""

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

from grafana_foundation_sdk.builders import common as build
from grafana_foundation_sdk.builders import prometheus, stat, table, timeseries
from grafana_foundation_sdk.models import common
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # it prefers the second format, which older servers do not read
    from grafana_foundation_sdk.builders import dashboard

TAG = "moa_serve"
SERVICE, ADAPTERS, EXPERTS = "moa-service", "moa-adapters", "moa-experts"  # uids: links and bookmarks name them
HERE = 'job=~"$job",instance=~"$instance"'
OF_ADAPTER = f'{HERE},adapter=~"$adapter"'
EVERYTHING = ".*"  # what All stands for
SOURCE = common.DataSourceRef(type_val="prometheus", uid="${datasource}")
EXPERT_ORDER = ("Q", "K", "V", "PROMPT", "O", "UP", "GATE", "DOWN", "P_ADAPTER")
KEPT = "${__url_time_range}&${datasource:queryparam}&${job:queryparam}&${instance:queryparam}"  # of a link: what was chosen

Board = dashboard.Dashboard
Panel = timeseries.Panel | stat.Panel | table.Panel


class Query(NamedTuple):
    """An expression, and what its series are called: labels in `{{braces}}`."""

    expr: str
    legend: str = ""


class Step(NamedTuple):
    """From this value on, this colour."""

    value: float
    color: str = "red"


def quantiles(metric: str, where: str, *shares: float, by: str = "", prefix: str = "") -> list[Query]:
    """Of a histogram, over all of its series or `by` a label."""
    return [
        Query(
            f"histogram_quantile({share:g}, sum by ({by + ', ' if by else ''}le) (rate({metric}_bucket{{{where}}}[$interval])))",
            f"{prefix}p{100 * share:g}" if not by else f"{{{{{by}}}}}",
        )
        for share in shares
    ]


def rate(metric: str, where: str, by: str = "", legend: str = "") -> Query:
    """Of a counter, per second."""
    expr = f"sum by ({by}) (rate({metric}{{{where}}}[$interval]))" if by else f"sum(rate({metric}{{{where}}}[$interval]))"
    return Query(expr, legend or " ".join(f"{{{{{label}}}}}" for label in by.replace(",", " ").split()))


def mean(total: str, count: str, where: str, by: str = "", legend: str = "") -> Query:
    """Of what two counters sum up and count."""
    over = rate(total, where, by, legend)
    return Query(f"{over.expr} / {rate(count, where, by).expr}", over.legend)


def graph(
    title: str,
    text: str,
    unit: str,
    *queries: Query,
    span: int = 8,
    height: int = 8,
    is_stacked: bool = False,
    limits: Sequence[Step] = (),
    top: float | None = None,
    link: str | None = None,
) -> timeseries.Panel:
    """Lines over time.

    Args:
        limits: values from which on something is wrong, drawn as lines.
        top: upper end of the axis.
        link: uid of the dashboard that a click on an adapter's line opens for it.
    """
    panel = timeseries.Panel().title(title).description(text).datasource(SOURCE).unit(unit).span(span).height(height).min(0)
    panel = panel.line_width(1).fill_opacity(30 if is_stacked else 5).show_points(common.VisibilityMode.NEVER)
    panel = panel.legend(
        build.VizLegendOptions()
        .show_legend(True)
        .display_mode(common.LegendDisplayMode.LIST)
        .calcs([])
        .placement(common.LegendPlacement.BOTTOM)
    )
    panel = panel.tooltip(build.VizTooltipOptions().mode(common.TooltipDisplayMode.MULTI).sort(common.SortOrder.DESCENDING))
    if is_stacked:
        panel = panel.stacking(build.StackingConfig().mode(common.StackingMode.NORMAL).group("A"))
    if top is not None:
        panel = panel.max(top)
    if limits:
        panel = panel.thresholds(_steps("transparent", limits))
        panel = panel.thresholds_style(build.GraphThresholdsStyleConfig().mode(common.GraphThresholdsStyleMode.LINE))
    if link is not None:
        panel = panel.data_links([_to_adapter(link)])
    return panel.targets([_target(query, index) for index, query in enumerate(queries)])


def number(
    title: str, text: str, unit: str, query: Query, *, span: int = 3, limits: Sequence[Step] = (), base: str = "green"
) -> stat.Panel:
    """One figure as of now, with a line of how it was; more than one where the query has several series."""
    panel = stat.Panel().title(title).description(text).datasource(SOURCE).unit(unit).span(span).height(4)
    panel = panel.thresholds(_steps(base, limits)).color_mode(common.BigValueColorMode.VALUE).graph_mode(common.BigValueGraphMode.AREA)
    panel = panel.reduce_options(build.ReduceDataOptions().calcs(["lastNotNull"]).fields("").values(False))
    return panel.with_target(_target(query, 0))


def listing(
    title: str,
    text: str,
    query: Query,
    columns: Sequence[str],
    *,
    unit: str = "short",
    value: str = "value",
    span: int = 8,
    height: int = 8,
) -> table.Panel:
    """The series of a query as of now, a row each: these labels and the value."""
    panel = table.Panel().title(title).description(text).datasource(SOURCE).span(span).height(height)
    panel = panel.with_target(_target(query, 0, is_table=True))
    panel = panel.with_transformation(_transformation("filterFieldsByName", include={"names": [*columns, "Value"]}))
    order = {name: index for index, name in enumerate([*columns, "Value"])}
    panel = panel.with_transformation(_transformation("organize", excludeByName={}, indexByName=order, renameByName={"Value": value}))
    return panel.override_by_name(value, [_config("unit", unit)])


def matrix(title: str, text: str, expr: str, *, rows: str, columns: str, unit: str, top: float = 1.0, span: int = 12) -> table.Panel:
    """A heat map of now: a row and a column for each value of two labels, the cell coloured by its value from 0 to `top`.

    A table, since Grafana's own heat map has time as one axis. `rows` are numbers.
    """
    corner = f"{rows}\\{columns}"
    panel = table.Panel().title(title).description(text).datasource(SOURCE).span(span).height(16)
    panel = panel.unit(unit).decimals(2).min(0).max(top).align(common.FieldTextAlignment.CENTER).min_width(60)
    panel = panel.color_scheme(dashboard.FieldColor().mode(models.FieldColorModeId.CONTINUOUS_BL_YL_RD))
    panel = panel.cell_options(common.TableColoredBackgroundCellOptions(common.TableCellBackgroundDisplayMode.BASIC))
    panel = panel.cell_height(common.TableCellHeight.SM).with_target(_target(Query(expr), 0, is_table=True))
    for transformation in (
        _transformation("convertFieldType", fields={}, conversions=[{"targetField": rows, "destinationType": "number"}]),
        _transformation("sortBy", fields={}, sort=[{"field": rows}]),
        _transformation("groupingToMatrix", rowField=rows, columnField=columns, valueField="Value", emptyValue="null"),
        _transformation(
            "organize", excludeByName={}, indexByName={name: index for index, name in enumerate((corner, *EXPERT_ORDER))}, renameByName={}
        ),
    ):
        panel = panel.with_transformation(transformation)
    plain = [_config("custom.cellOptions", {"type": "auto"}), _config("unit", "none"), _config("decimals", 0), _config("displayName", rows)]
    return panel.override_by_name(corner, plain)


def new_dashboard(uid: str, title: str, text: str, *variables: Any) -> Board:
    """Empty, with links to the others and the alerts that fire drawn into every graph."""
    expr = 'ALERTS{alertstate="firing",job=~"$job"}'
    firing = dashboard.AnnotationQuery().name("Alerts").datasource(SOURCE).enable(True).icon_color("red").expr(expr)
    firing = firing.title_format("{{alertname}} {{instance}} {{adapter}}").target(prometheus.Dataquery().expr(expr).ref_id("Anno"))
    others = dashboard.DashboardLink("moa_serve").type(models.DashboardLinkType.DASHBOARDS).tags([TAG]).icon("external link")
    others = others.include_vars(True).keep_time(True)
    for built in (firing.build(), others.build()):
        built.placement = None  # type: ignore[assignment]  # above the panels, not in a menu; the schema lets it be absent
    board = Board(title).uid(uid).description(text).tags([TAG]).editable().refresh("30s").time("now-1h", "now")
    board = board.timezone("browser").tooltip(models.DashboardCursorSync.CROSSHAIR).links([others]).annotation(firing)
    source = dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus")
    job = choice("job", "Job", "label_values(moa_engine_steps_total, job)")
    instance = choice("instance", "Instance", 'label_values(moa_engine_steps_total{job=~"$job"}, instance)')
    interval = dashboard.IntervalVariable("interval").label("Interval").values("1m,2m,5m,15m,1h,6h")
    interval = interval.current(models.VariableOption(selected=True, text="5m", value="5m"))
    return board.variables([source, job, instance, *variables, interval])


def choice(name: str, label: str, query: str) -> dashboard.QueryVariable:
    """A variable of any number of a label's values, or All."""
    variable = dashboard.QueryVariable(name).label(label).query(query).definition(query).datasource(SOURCE)
    variable = variable.refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED).sort(models.VariableSort.NATURAL_ASC)
    return (
        variable.multi(True)
        .include_all(True)
        .all_value(EVERYTHING)
        .current(models.VariableOption(selected=True, text=["All"], value=["$__all"]))
    )


def with_rows(board: Board, *rows: tuple[str, Sequence[Panel]]) -> Board:
    """The panels of each row under its title."""
    for title, panels in rows:
        board = board.with_row(dashboard.Row(title))
        for panel in panels:
            board = board.with_panel(panel)
    return board


def _target(query: Query, index: int, *, is_table: bool = False) -> prometheus.Dataquery:
    target = prometheus.Dataquery().expr(query.expr).ref_id(chr(ord("A") + index)).datasource(SOURCE)
    target = target.instant().format(PromQueryFormat.TABLE) if is_table else target.range()
    return target.legend_format(query.legend) if query.legend else target


def _steps(base: str, limits: Sequence[Step]) -> dashboard.ThresholdsConfig:
    steps = [models.Threshold(None, base), *(models.Threshold(step.value, step.color) for step in limits)]
    return dashboard.ThresholdsConfig().mode(models.ThresholdsMode.ABSOLUTE).steps(steps)


def _to_adapter(uid: str) -> dashboard.DashboardLink:
    link = dashboard.DashboardLink("${__field.labels.adapter}")
    return link.url(f"/d/{uid}?{KEPT}&var-adapter=${{__field.labels.adapter}}")


def _transformation(kind: str, **options: Any) -> models.DataTransformerConfig:
    return models.DataTransformerConfig(id_val=kind, options=options)


def _config(name: str, value: Any) -> models.DynamicConfigValue:
    return models.DynamicConfigValue(id_val=name, value=value)
