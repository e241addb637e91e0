//! Reports as charts: a grid of panels, one for each metric of a protocol.

use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::axis::Axis;
use super::{Measurement, Report, Row, label};
use crate::statistics::Estimate;

/// The size of the font in pixels.
const FONT: f64 = 16.0;
const TITLE_FONT: f64 = 22.0;
/// The ratio of the size that the SVG backend draws to the size of the font.
const DRAWN: f64 = 1.0 / 1.24;

const MARGIN: i32 = 28;
const TITLE: i32 = 44;
/// The height of the line above a panel.
const HEADER: i32 = 30;
const ROW: i32 = 24;
/// The height of the ticks and of the name of the axis.
const FOOTER: i32 = 50;
const GAP: i32 = 30;
/// The space between the names, the points and the values of a panel.
const PAD: i32 = 14;

const TEXT: RGBColor = RGBColor(0x22, 0x22, 0x22);
const FAINT: RGBColor = RGBColor(0x66, 0x66, 0x66);
const GRID: RGBColor = RGBColor(0xe2, 0xe2, 0xe2);

/// The palette of Okabe and Ito, legible for the color-blind, without its light yellow.
const COLORS: [RGBColor; 7] = [
    RGBColor(0x00, 0x72, 0xb2),
    RGBColor(0xd5, 0x5e, 0x00),
    RGBColor(0x00, 0x9e, 0x73),
    RGBColor(0xcc, 0x79, 0xa7),
    RGBColor(0xe6, 0x9f, 0x00),
    RGBColor(0x56, 0xb4, 0xe9),
    RGBColor(0x00, 0x00, 0x00),
];

type Area<'a> = DrawingArea<SVGBackend<'a>, plotters::coord::Shift>;
type Drawn<'a> = Result<(), DrawingAreaErrorKind<<SVGBackend<'a> as DrawingBackend>::ErrorType>>;

/// The layout that all panels share.
struct Layout<'a> {
    models: Vec<&'a str>,
    panel: i32,
    names: i32,
    values: i32,
}

impl Layout<'_> {
    /// The ends of the axis of a panel.
    fn span(&self, left: i32) -> (i32, i32) {
        let right = left + self.panel - self.values;
        (left + self.names + PAD, right - PAD)
    }

    /// The horizontal position of a value in a panel.
    fn x(&self, axis: &Axis, left: i32, value: f64) -> i32 {
        let (from, to) = self.span(left);
        from + (axis.place(value) * f64::from(to - from)).round() as i32
    }
}

impl Report {
    /// The report as a chart in SVG: a panel for each metric, a point and an interval for each model.
    ///
    /// An axis is logarithmic if its values span more than a factor of 30.
    pub fn to_svg(&self) -> String {
        svg(self)
    }
}

fn svg(report: &Report) -> String {
    let rows = report.rows();
    let (n_columns, panel) = match rows.len() {
        0..=3 => (1, 760),
        4..=12 => (2, 600),
        _ => (3, 560),
    };
    let widest = |texts: &mut dyn Iterator<Item = String>| {
        let widths = texts.map(|text| width(&text).ceil() as i32);
        widths.max().unwrap_or(0)
    };
    let models = report.models();
    let layout = Layout {
        names: widest(&mut models.iter().map(|name| label::one_line(name))).min(panel * 2 / 5),
        values: widest(&mut rows.iter().flat_map(values)),
        models,
        panel,
    };
    let lines: Vec<&[Row<'_>]> = rows.chunks(n_columns).collect();
    let height_of = |row: &Row<'_>| HEADER + ROW * row.measurements.len() as i32 + FOOTER;
    let heights = lines
        .iter()
        .map(|line| line.iter().map(height_of).max().unwrap_or(0));
    let heights: Vec<i32> = heights.collect();
    let n_columns = n_columns as i32;
    let full_width = 2 * MARGIN + n_columns * panel + (n_columns - 1) * GAP;
    let height = 2 * MARGIN + TITLE + heights.iter().map(|height| height + GAP).sum::<i32>()
        - GAP.min(heights.len() as i32 * GAP);

    let mut svg = String::new();
    let draw = |svg: &mut String| -> Drawn<'_> {
        let area = SVGBackend::with_string(svg, (full_width as u32, height as u32));
        let area = area.into_drawing_area();
        area.fill(&WHITE)?;
        let room = f64::from(full_width - 2 * MARGIN);
        let title = label::shortened(&label::one_line(&report.title), TITLE_FONT * DRAWN, room);
        let style = ("sans-serif", TITLE_FONT).into_font().color(&TEXT);
        area.draw(&Text::new(title, (MARGIN, MARGIN), style))?;
        if rows.is_empty() {
            let at = (MARGIN, MARGIN + 30);
            return text(&area, "no measurements", at, HPos::Left, &FAINT);
        }
        let mut top = MARGIN + TITLE;
        for (line, height) in lines.iter().zip(&heights) {
            for (column, row) in line.iter().enumerate() {
                let left = MARGIN + column as i32 * (panel + GAP);
                draw_panel(&area, &layout, row, (left, top))?;
            }
            top += height + GAP;
        }
        area.present()
    };
    draw(&mut svg).expect("writing to a string");
    svg
}

fn draw_panel<'a>(
    area: &Area<'a>,
    layout: &Layout<'_>,
    row: &Row<'_>,
    (left, top): (i32, i32),
) -> Drawn<'a> {
    let right = left + layout.panel;
    let items = shortened(&row.items(), f64::from(layout.panel / 2));
    let room = f64::from(layout.panel - PAD) - width(&items);
    // Bold letters are wider.
    let protocol = shortened(row.protocol, room / 1.12);
    let bold = ("sans-serif", FONT, FontStyle::Bold).into_font();
    let bold = bold.color(&TEXT).pos(Pos::new(HPos::Left, VPos::Center));
    area.draw(&Text::new(protocol, (left, top + 8), bold))?;
    text(area, &items, (right, top + 8), HPos::Right, &FAINT)?;

    let axis = Axis::of(row.measurements.iter().flat_map(|of| ends(of)));
    let top = top + HEADER;
    draw_axis(area, layout, row, &axis, (left, top))?;
    let order = |of: &Measurement| layout.models.iter().position(|name| **name == of.model);
    let mut measurements: Vec<_> = row.measurements.iter().zip(values(row)).collect();
    measurements.sort_by_key(|(of, _)| order(of));
    for (at, (of, value)) in measurements.iter().enumerate() {
        let y = top + ROW * at as i32 + ROW / 2 - 4;
        let color = COLORS[order(of).unwrap_or(0) % COLORS.len()];
        let name = shortened(&of.model, f64::from(layout.names));
        let end = left + layout.names;
        text(area, &name, (end, y), HPos::Right, &TEXT)?;
        text(area, value, (right, y), HPos::Right, &TEXT)?;
        draw_estimate(area, of, y, color, |value| layout.x(&axis, left, value))?;
    }
    Ok(())
}

/// Draws the ticks and the name of the axis below the measurements of a panel.
fn draw_axis<'a>(
    area: &Area<'a>,
    layout: &Layout<'_>,
    row: &Row<'_>,
    axis: &Axis,
    (left, top): (i32, i32),
) -> Drawn<'a> {
    let x = |value| layout.x(axis, left, value);
    let (from, to) = layout.span(left);
    let bottom = top + ROW * row.measurements.len() as i32;
    // The largest number of ticks whose labels do not overlap.
    let apart = |ticks: &Vec<(f64, String)>| {
        let half = |label: &str| (width(label) / 2.0) as i32 + 4;
        let mut pairs = ticks.windows(2);
        pairs.all(|pair| x(pair[0].0) + half(&pair[0].1) <= x(pair[1].0) - half(&pair[1].1))
    };
    let ticks = (1..=5).rev().map(|n| axis.ticks(n)).find(apart);
    for (value, tick) in ticks.unwrap_or_default() {
        let x = x(value);
        let line = [(x, top - 6), (x, bottom)];
        area.draw(&PathElement::new(line, GRID))?;
        text(area, &tick, (x, bottom + 12), HPos::Center, &FAINT)?;
    }
    area.draw(&PathElement::new([(from, bottom), (to, bottom)], FAINT))?;
    let better = if row.lower_is_better {
        "lower"
    } else {
        "higher"
    };
    let scale = if axis.is_log { ", log scale" } else { "" };
    let about = format!(" ({better} is better{scale})");
    let room = f64::from(layout.panel) - width(&about);
    let name = shortened(row.metric, room) + &about;
    // Centered below the axis, but inside of the panel.
    let half = (width(&name) / 2.0).ceil() as i32;
    let half = half.min(layout.panel / 2);
    let middle = ((from + to) / 2).clamp(left + half, left + layout.panel - half);
    text(area, &name, (middle, bottom + 34), HPos::Center, &TEXT)
}

/// Draws a point and its interval.
fn draw_estimate<'a>(
    area: &Area<'a>,
    of: &Measurement,
    y: i32,
    color: RGBColor,
    x: impl Fn(f64) -> i32,
) -> Drawn<'a> {
    let estimate = &of.estimate;
    if label::has_interval(estimate) {
        let (lower, upper) = (x(estimate.lower), x(estimate.upper));
        let thick = color.stroke_width(2);
        area.draw(&PathElement::new([(lower, y), (upper, y)], thick))?;
        for end in [lower, upper] {
            area.draw(&PathElement::new([(end, y - 5), (end, y + 5)], thick))?;
        }
    }
    if estimate.value.is_finite() {
        area.draw(&Circle::new((x(estimate.value), y), 5, color.filled()))?;
    }
    Ok(())
}

/// The approximate width of a text in pixels.
fn width(text: &str) -> f64 {
    label::width(text, FONT * DRAWN)
}

/// A name on one line, shortened to a width of `room` pixels.
fn shortened(name: &str, room: f64) -> String {
    label::shortened(&label::one_line(name), FONT * DRAWN, room)
}

/// The values of a panel as texts.
fn values(row: &Row<'_>) -> Vec<String> {
    let estimates = || row.measurements.iter().map(|of| &of.estimate);
    let decimals = label::decimals(estimates());
    estimates()
        .map(|estimate| label::value(estimate, decimals))
        .collect()
}

/// The values of a measurement that its axis must include.
fn ends(of: &Measurement) -> [f64; 3] {
    let Estimate {
        value,
        lower,
        upper,
        ..
    } = of.estimate;
    if label::has_interval(&of.estimate) {
        [value, lower, upper]
    } else {
        [value; 3]
    }
}

fn text<'a>(
    area: &Area<'a>,
    text: &str,
    at: (i32, i32),
    side: HPos,
    color: &RGBColor,
) -> Drawn<'a> {
    let style = ("sans-serif", FONT).into_font().color(color);
    let style = style.pos(Pos::new(side, VPos::Center));
    area.draw(&Text::new(text.to_string(), at, style))
}
