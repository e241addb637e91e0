//! Markdown tables with aligned columns.

use std::fmt::Write as _;

/// Formats rows as a table with right-aligned columns; the first row is the header.
pub fn markdown<R: AsRef<[String]>>(rows: &[R]) -> String {
    let rows: Vec<&[String]> = rows.iter().map(AsRef::as_ref).collect();
    let n_columns = rows.first().map_or(0, |header| header.len());
    let widths = (0..n_columns).map(|column| {
        let cells = rows.iter().map(|row| row[column].chars().count());
        cells.max().unwrap_or(0)
    });
    let widths: Vec<usize> = widths.collect();
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

/// Formats a number with so many decimals, or a dash if there is none.
pub fn number(value: Option<f64>, digits: usize) -> String {
    value.map_or("-".into(), |value| format!("{value:.digits$}"))
}

/// The mean of numbers, and how far the farthest is from it if there are several; a dash for none.
pub fn spread(values: &[f64]) -> String {
    if values.is_empty() {
        return "-".into();
    }
    let mean = values.iter().sum::<f64>() / values.len() as f64;
    let digits = if mean < 100.0 { 3 } else { 0 };
    match values {
        [_] => format!("{mean:.digits$}"),
        _ => {
            let far = values.iter().map(|value| (value - mean).abs());
            let far = far.fold(0.0, f64::max);
            format!("{mean:.digits$} ± {far:.digits$}")
        }
    }
}
