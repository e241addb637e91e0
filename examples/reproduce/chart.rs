//! The perplexities of an experiment as an SVG.

use examples::table::number;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::report::{Bar, Section, mean, range};

const EVAL: RGBColor = RGBColor(0x4a, 0x78, 0xb5);
const DRIFT: RGBColor = RGBColor(0xc9, 0xd8, 0xea);
const TEXT: RGBColor = RGBColor(0x30, 0x30, 0x30);

const WIDTH: i32 = 980;
const LEFT: i32 = 300;
const RIGHT: i32 = 800;
const TOP: i32 = 96;
const ROW: i32 = 26;

/// Draws a bar for each model, on a logarithmic axis from the least perplexity on.
pub(crate) fn svg(section: &Section) -> String {
    let height = TOP + ROW * section.bars.len() as i32 + 40;
    let mut svg = String::new();
    let draw = |svg: &mut String| -> std::result::Result<(), DrawingAreaErrorKind<_>> {
        let area = SVGBackend::with_string(svg, (WIDTH as u32, height as u32)).into_drawing_area();
        area.fill(&WHITE)?;
        let text = |size: i32| ("sans-serif", size).into_font().color(&TEXT);
        let small = text(14);
        let title = format!("{}: perplexity, on a logarithmic axis", section.title);
        area.draw(&Text::new(title, (20, 14), text(19)))?;
        let kinds = [("held-out text", EVAL), ("other text", DRIFT)];
        for (at, (name, colour)) in kinds.into_iter().enumerate() {
            let x = LEFT + 150 * at as i32;
            area.draw(&Rectangle::new([(x, 50), (x + 14, 64)], colour.filled()))?;
            area.draw(&Text::new(name, (x + 20, 50), small.clone()))?;
        }
        let dense = section.dense.perplexity();
        let all = section
            .bars
            .iter()
            .flat_map(|bar| bar.eval.iter().chain(&bar.drift));
        let (least, most) = range(&all.copied().chain([dense]).collect::<Vec<_>>());
        let from = 0.9 * least;
        let scale = f64::from(RIGHT - LEFT) / (most / from).ln();
        let x = |value: f64| LEFT + ((value / from).ln() * scale) as i32;
        let at_end = small.pos(Pos::new(HPos::Right, VPos::Top));
        for (at, bar) in section.bars.iter().enumerate() {
            let y = TOP + ROW * at as i32;
            area.draw(&Text::new(
                bar.label.clone(),
                (LEFT - 12, y + 2),
                at_end.clone(),
            ))?;
            for (values, colour, y, height) in
                [(&bar.eval, EVAL, y, 12), (&bar.drift, DRIFT, y + 12, 6)]
            {
                if let Some(mean) = mean(values) {
                    let end = [(LEFT, y), (x(mean), y + height)];
                    area.draw(&Rectangle::new(end, colour.filled()))?;
                    let (least, most) = range(values);
                    let middle = y + height / 2;
                    area.draw(&PathElement::new(
                        [(x(least), middle), (x(most), middle)],
                        TEXT,
                    ))?;
                }
            }
            area.draw(&Text::new(values(bar), (WIDTH - 20, y + 2), at_end.clone()))?;
        }
        let end = TOP + ROW * section.bars.len() as i32;
        area.draw(&PathElement::new(
            [(x(dense), TOP - 6), (x(dense), end)],
            TEXT,
        ))?;
        let label = format!("dense, held-out text: {dense:.3}");
        area.draw(&Text::new(label, (x(dense), end + 10), small))?;
        area.present()
    };
    draw(&mut svg).expect("writing to a string");
    svg
}

/// The mean perplexities.
fn values(bar: &Bar) -> String {
    let of = |values: &[f64]| number(mean(values), 2);
    if bar.drift.is_empty() {
        return of(&bar.eval);
    }
    format!("{}; {}", of(&bar.eval), of(&bar.drift))
}
