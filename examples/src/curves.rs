//! The curves of a training as SVG: loss, learning rate and norm of the gradients by step.

use std::ops::Range;

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::training_log::Record;

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Drawn<'a> =
    std::result::Result<(), DrawingAreaErrorKind<<SVGBackend<'a> as DrawingBackend>::ErrorType>>;

/// The largest magnitude that is drawn.
const LARGEST: f64 = 1e100;
const WIDTH: u32 = 900;
const TITLE: u32 = 44;
const TRAIN: RGBColor = RGBColor(0x4a, 0x78, 0xb5);
const EVAL: RGBColor = RGBColor(0xc4, 0x4e, 0x42);
const LIGHT: RGBColor = RGBColor(0xb9, 0xcd, 0xe4);
const FAINT: RGBColor = RGBColor(0x90, 0x90, 0x90);
const GRID: RGBColor = RGBColor(0xe4, 0xe4, 0xe4);
const TEXT: RGBColor = RGBColor(0x30, 0x30, 0x30);

/// A panel: a quantity by step.
struct Panel {
    name: &'static str,
    height: u32,
    points: Vec<(f64, f64)>,
    /// The same quantity in evaluations.
    eval: Vec<(f64, f64)>,
    /// Whether it is a loss: its axis does not begin at 0, and it is averaged.
    is_loss: bool,
}

/// Draws the curves of the steps of a training.
pub fn svg(title: &str, records: &[Record]) -> String {
    let points = |value: fn(&Record) -> Option<f64>| {
        let points = records.iter();
        points
            .filter_map(|record| Some((record.step as f64, value(record)?)))
            .filter(|(_, value)| value.abs() <= LARGEST)
            .collect::<Vec<_>>()
    };
    let panels = [
        Panel {
            name: "loss, nats per target",
            height: 310,
            points: points(|record| Some(record.loss)),
            eval: points(|record| record.eval_loss),
            is_loss: true,
        },
        Panel {
            name: "learning rate",
            height: 170,
            points: points(|record| Some(record.learning_rate)),
            eval: Vec::new(),
            is_loss: false,
        },
        Panel {
            name: "gradient norm",
            height: 210,
            points: points(|record| Some(record.grad_norm)),
            eval: Vec::new(),
            is_loss: false,
        },
    ];
    let height = TITLE + panels.iter().map(|panel| panel.height).sum::<u32>();
    let mut svg = String::new();
    let draw = |svg: &mut String| -> Drawn<'_> {
        let area = SVGBackend::with_string(svg, (WIDTH, height)).into_drawing_area();
        area.fill(&WHITE)?;
        let style = ("sans-serif", 19).into_font().color(&TEXT);
        area.draw(&Text::new(title.to_string(), (16, 14), style))?;
        let (_, mut rest) = area.split_vertically(TITLE);
        let last = records.last().map_or(1, |record| record.step);
        for (at, panel) in panels.iter().enumerate() {
            let (area, below) = rest.split_vertically(panel.height);
            rest = below;
            draw_panel(&area, panel, 0.0..last as f64, at + 1 == panels.len())?;
        }
        area.present()
    };
    draw(&mut svg).expect("writing to a string");
    svg
}

fn draw_panel<'a>(area: &Area<'a>, panel: &Panel, steps: Range<f64>, is_last: bool) -> Drawn<'a> {
    let mut chart = ChartBuilder::on(area)
        .margin_left(12)
        .margin_right(24)
        .margin_top(8)
        .x_label_area_size(if is_last { 46 } else { 26 })
        .y_label_area_size(80)
        .build_cartesian_2d(steps, panel.range())?;
    let mut mesh = chart.configure_mesh();
    let text = |size: i32| ("sans-serif", size).into_font().color(&TEXT);
    mesh.light_line_style(TRANSPARENT)
        .bold_line_style(GRID)
        .axis_style(FAINT)
        .label_style(text(14))
        .axis_desc_style(text(15))
        .x_labels(10)
        .y_labels(panel.height as usize / 34)
        .y_desc(panel.name)
        .x_label_formatter(&|step| format!("{step:.0}"))
        .y_label_formatter(&|value| label(*value));
    if is_last {
        mesh.x_desc("step");
    }
    mesh.draw()?;
    let line = |points: &[(f64, f64)], style: ShapeStyle| PathElement::new(points.to_vec(), style);
    let mut legend = Vec::new();
    let mean = if panel.is_loss { panel.mean() } else { None };
    match &mean {
        None => {
            chart.draw_series([line(&panel.points, TRAIN.stroke_width(2))])?;
            legend.push(("training".to_string(), TRAIN));
        }
        Some((n, mean)) => {
            chart.draw_series([line(&panel.points, LIGHT.stroke_width(1))])?;
            chart.draw_series([line(mean, TRAIN.stroke_width(2))])?;
            legend.push(("training".to_string(), LIGHT));
            legend.push((format!("training, mean of {n} steps"), TRAIN));
        }
    }
    if !panel.eval.is_empty() {
        chart.draw_series([line(&panel.eval, EVAL.stroke_width(1))])?;
        let circle = |&at: &(f64, f64)| Circle::new(at, 4, EVAL.filled());
        chart.draw_series(panel.eval.iter().map(circle))?;
        legend.push(("evaluation".to_string(), EVAL));
    }
    if panel.is_loss {
        draw_legend(area, &legend)?;
    }
    Ok(())
}

/// Draws the names of the curves above each other, in the upper right, where a loss that falls is not.
fn draw_legend<'a>(area: &Area<'a>, legend: &[(String, RGBColor)]) -> Drawn<'a> {
    let right = WIDTH as i32 - 40;
    for (at, (name, color)) in legend.iter().enumerate() {
        let y = 24 + 20 * at as i32;
        let line = [(right - 30, y), (right, y)];
        area.draw(&PathElement::new(line, color.stroke_width(3)))?;
        let style = ("sans-serif", 14).into_font().color(&TEXT);
        let style = style.pos(Pos::new(HPos::Right, VPos::Center));
        area.draw(&Text::new(name.clone(), (right - 38, y), style))?;
    }
    Ok(())
}

impl Panel {
    /// The axis: all values with some room.
    fn range(&self) -> Range<f64> {
        let values = self.points.iter().chain(&self.eval).map(|(_, y)| *y);
        let none = (f64::INFINITY, f64::NEG_INFINITY);
        let (least, most) = values.fold(none, |(least, most), value| {
            (least.min(value), most.max(value))
        });
        if least > most {
            return 0.0..1.0;
        }
        let least = if self.is_loss { least } else { least.min(0.0) };
        let room = match most - least {
            0.0 => most.abs().max(1e-9),
            range => range,
        };
        let below = if self.is_loss { 0.06 * room } else { 0.0 };
        least - below..most + 0.08 * room
    }

    /// The mean of the steps around each one, and of how many; none of few steps.
    fn mean(&self) -> Option<(usize, Vec<(f64, f64)>)> {
        let half = self.points.len() / 25;
        if half == 0 {
            return None;
        }
        let mean = |at: usize| {
            // As many before it as after it: a loss that falls is not shifted.
            let half = half.min(at).min(self.points.len() - 1 - at);
            let around = &self.points[at - half..=at + half];
            let sum: f64 = around.iter().map(|(_, y)| y).sum();
            (self.points[at].0, sum / around.len() as f64)
        };
        Some((2 * half + 1, (0..self.points.len()).map(mean).collect()))
    }
}

/// A number on an axis.
fn label(value: f64) -> String {
    let magnitude = value.abs();
    let (digits, power) = if magnitude < 1e-12 {
        return "0".into();
    } else if (0.01..1e5).contains(&magnitude) {
        (format!("{value:.3}"), String::new())
    } else {
        let text = format!("{value:.2e}");
        let (digits, power) = text.split_once('e').unwrap_or((&text, "0"));
        (digits.into(), format!("e{power}"))
    };
    digits
        .trim_end_matches('0')
        .trim_end_matches('.')
        .to_string()
        + &power
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_short() {
        let labels = [0.0, 3e-4, 0.00075, 0.30000000000000004, 2.5, 120.0, 4e6].map(label);
        assert_eq!(labels, ["0", "3e-4", "7.5e-4", "0.3", "2.5", "120", "4e6"]);
    }

    #[test]
    fn any_training_is_drawn() {
        let record = |step: usize| Record {
            step,
            loss: 3.0 / step as f64,
            learning_rate: 0.0,
            grad_norm: f64::MAX,
            n_targets: 1,
            eval_loss: step.is_multiple_of(10).then_some(2.5),
            timing: None,
        };
        for n in [0, 1, 2, 24, 500] {
            let records: Vec<Record> = (1..=n).map(record).collect();
            let svg = svg("<a title>", &records);
            assert!(svg.contains("&lt;a title&gt;") && svg.contains("learning rate"));
            assert_eq!(svg.matches("<circle").count(), n / 10);
            assert_eq!(svg.contains("mean of"), n > 24);
        }
    }
}
