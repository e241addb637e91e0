//! A report as Markdown that also reads well in a terminal.

use std::fmt::Write as _;

use super::{Report, label};

pub(super) fn markdown(report: &Report) -> String {
    let mut text = format!("# {}\n", escaped(&report.title));
    if !report.settings.is_empty() {
        text.push('\n');
    }
    for (name, value) in &report.settings {
        writeln!(text, "* {}: {}", escaped(name), escaped(value)).expect("writing to a string");
    }
    if report.measurements.is_empty() {
        return text;
    }
    text.push('\n');
    text.push_str(&table(&cells(report)));
    let estimates = || report.measurements.iter().map(|of| &of.estimate);
    let note = match estimates().any(label::has_interval) {
        true => "↓: lower is better, ↑: higher is better. In brackets: the confidence interval.",
        false => "↓: lower is better, ↑: higher is better.",
    };
    writeln!(text, "\n{note}").expect("writing to a string");
    text
}

fn cells(report: &Report) -> Vec<Vec<String>> {
    let models = report.models();
    let header = ["protocol", "metric", "items"].map(String::from);
    let header = header
        .into_iter()
        .chain(models.iter().map(|name| escaped(name)));
    let mut rows = vec![header.collect::<Vec<_>>()];
    for row in report.rows() {
        let metric = format!(
            "{} {}",
            escaped(row.metric),
            label::arrow(row.lower_is_better)
        );
        let mut cells = vec![escaped(row.protocol), metric, escaped(&row.items())];
        let decimals = label::decimals(row.measurements.iter().map(|of| &of.estimate));
        for model in &models {
            let of_model = row.measurements.iter().filter(|of| of.model == **model);
            let text = of_model.map(|of| label::with_interval(&of.estimate, decimals));
            let found: Vec<String> = text.collect();
            cells.push(match found.is_empty() {
                true => "-".into(),
                false => found.join(" / "),
            });
        }
        rows.push(cells);
    }
    rows
}

/// The table of these rows, whose first is the header: two columns of names, and numbers.
fn table(rows: &[Vec<String>]) -> String {
    let n_columns = rows.first().map_or(0, Vec::len);
    let widths: Vec<usize> = (0..n_columns)
        .map(|column| {
            let cells = rows.iter().map(|row| row[column].chars().count());
            cells.max().unwrap_or(0)
        })
        .collect();
    let mut text = String::new();
    let mut line = |row: &[String]| {
        for (column, (cell, &width)) in row.iter().zip(&widths).enumerate() {
            match column < 2 {
                true => write!(text, "| {cell:<width$} "),
                false => write!(text, "| {cell:>width$} "),
            }
            .expect("writing to a string");
        }
        text.push_str("|\n");
    };
    for (at, row) in rows.iter().enumerate() {
        line(row);
        if at == 0 {
            let rule = |(column, &width): (usize, &usize)| match column < 2 {
                true => "-".repeat(width),
                false => "-".repeat(width.saturating_sub(1)) + ":",
            };
            line(&widths.iter().enumerate().map(rule).collect::<Vec<_>>());
        }
    }
    text
}

/// A name on one line that means itself: no markup, no entity, no border of a cell.
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
            // Inside of a word, as in `q_proj`, it marks nothing.
            '_' if beside(at.checked_sub(1)) && beside(Some(at + 1)) => text.push(c),
            '\\' | '|' | '`' | '*' | '_' | '[' | '~' => text.extend(['\\', c]),
            _ => text.push(c),
        }
    }
    text
}
