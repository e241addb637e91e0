//! Tables in Markdown that also read well in a terminal.

use std::fmt::Write as _;

/// The table of these rows, whose first is the header, numbers to the right.
pub fn markdown<const N: usize>(rows: &[[String; N]]) -> String {
    let widths: [usize; N] = std::array::from_fn(|column| {
        let cells = rows.iter().map(|row| row[column].chars().count());
        cells.max().unwrap_or(0)
    });
    let mut text = String::new();
    for (at, row) in rows.iter().enumerate() {
        for (cell, width) in row.iter().zip(&widths) {
            write!(text, "| {cell:>width$} ").expect("writing to a string");
        }
        text.push_str("|\n");
        if at == 0 {
            for width in &widths {
                write!(text, "|{:->1$}:", "", width + 1).expect("writing to a string");
            }
            text.push_str("|\n");
        }
    }
    text
}

/// A number with so many digits after the point, or a dash.
pub fn number(value: Option<f64>, digits: usize) -> String {
    value.map_or("-".into(), |value| format!("{value:.digits$}"))
}
