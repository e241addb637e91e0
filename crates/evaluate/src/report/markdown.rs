//! Reports as Markdown that is readable as plain text, and as that text.

use std::fmt::{self, Write as _};

use super::{Report, label};

impl Report {
    /// The report as Markdown: title, settings, and a table with a column for each model.
    ///
    /// A cell has a value and its interval, with as many digits as the interval makes significant; one
    /// item has no interval. Names are escaped.
    pub fn to_markdown(&self) -> String {
        self.text(escaped)
    }

    /// The report with names as `name` writes them.
    fn text(&self, name: fn(&str) -> String) -> String {
        let mut text = format!("# {}\n", name(&self.title));
        if !self.settings.is_empty() {
            text.push('\n');
        }
        for (setting, value) in &self.settings {
            writeln!(text, "* {}: {}", name(setting), name(value)).expect("writing to a string");
        }
        if self.measurements.is_empty() {
            return text;
        }
        text.push('\n');
        text.push_str(&table(&cells(self, name)));
        text.push_str("\n↓: lower is better, ↑: higher is better.");
        let mut estimates = self.measurements.iter().map(|of| &of.estimate);
        if estimates.any(label::has_interval) {
            text.push_str(" In brackets: the confidence interval.");
        }
        text + "\n"
    }
}

/// The text of [`Report::to_markdown`] without escapes, for a terminal.
impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text(label::one_line))
    }
}

fn cells(report: &Report, name: fn(&str) -> String) -> Vec<Vec<String>> {
    let models = report.models();
    let header = ["protocol", "metric", "items"].map(String::from);
    let header = header
        .into_iter()
        .chain(models.iter().map(|model| name(model)));
    let mut rows = vec![header.collect::<Vec<_>>()];
    for row in report.rows() {
        let metric = format!("{} {}", name(row.metric), label::arrow(row.lower_is_better));
        let mut cells = vec![name(row.protocol), metric, name(&row.items())];
        let decimals = label::decimals(row.measurements.iter().map(|of| &of.estimate));
        for model in &models {
            let of_model = row.measurements.iter().filter(|of| of.model == **model);
            let text = of_model.map(|of| label::with_interval(&of.estimate, decimals));
            let found: Vec<String> = text.collect();
            cells.push(if found.is_empty() {
                "-".into()
            } else {
                found.join(" / ")
            });
        }
        rows.push(cells);
    }
    rows
}

/// A table of rows, the first of which is the header: two columns of names, then numbers.
///
/// Cells of more than 100 characters do not widen their column: it would be as long in every row, and
/// `format!` pads to at most 65,535 characters.
fn table(rows: &[Vec<String>]) -> String {
    const WIDEST: usize = 100;
    let n_columns = rows.first().map_or(0, Vec::len);
    let widths: Vec<usize> = (0..n_columns)
        .map(|column| {
            let cells = rows.iter().map(|row| row[column].chars().count());
            cells.max().unwrap_or(0).min(WIDEST)
        })
        .collect();
    let mut text = String::new();
    let mut line = |row: &[String]| {
        for (column, (cell, &width)) in row.iter().zip(&widths).enumerate() {
            let written = if column < 2 {
                write!(text, "| {cell:<width$} ")
            } else {
                write!(text, "| {cell:>width$} ")
            };
            written.expect("writing to a string");
        }
        text.push_str("|\n");
    };
    for (at, row) in rows.iter().enumerate() {
        line(row);
        if at == 0 {
            let rule = |(column, &width): (usize, &usize)| {
                if column < 2 {
                    "-".repeat(width)
                } else {
                    "-".repeat(width.saturating_sub(1)) + ":"
                }
            };
            line(&widths.iter().enumerate().map(rule).collect::<Vec<_>>());
        }
    }
    text
}

/// A name on one line, with markup, entities and borders of cells escaped.
fn escaped(name: &str) -> String {
    let characters: Vec<char> = label::one_line(name).chars().collect();
    let mut text = String::new();
    for (at, &c) in characters.iter().enumerate() {
        let beside = |at: Option<usize>| {
            let c = at.and_then(|at| characters.get(at));
            c.is_some_and(|c| c.is_alphanumeric())
        };
        match c {
            '<' => text.push_str("&lt;"),
            '&' => text.push_str("&amp;"),
            // Inside of a word, as in `q_proj`, an underscore is no markup.
            '_' if beside(at.checked_sub(1)) && beside(Some(at + 1)) => text.push(c),
            '\\' | '|' | '`' | '*' | '_' | '[' | '~' => text.extend(['\\', c]),
            _ => text.push(c),
        }
    }
    text
}
