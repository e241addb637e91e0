//! The report: Markdown, JSON and a chart for each experiment.

use std::fmt::Write as _;

use examples::outcome::Result;
use examples::rate::Search;
use examples::table::spread;
use examples::{interrupt, table};
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::chart;
use crate::claim::{Claim, Verdict};
use crate::lab::Lab;
use crate::losses::Losses;

/// What the numbers of all sections are.
const INTRODUCTION: &str = "\
Perplexities are those of windows of `seq_len` tokens in the protocol of OPTQ; *held out* is text of the kind that \
is calibrated and tuned on, *other text* is of another kind. Models are tuned for `steps` steps of `batch` windows of \
`tune_len` tokens, at the best of four learning rates by `search_steps` steps each, measured on windows that are \
neither trained nor evaluated on; a section that does otherwise says so. Numbers of several seeds are the mean ± the \
largest distance from it.\n\n\
A claim that compares is *shown* if in each pair the first model's loss is below the second's: the number is the \
first minus the second in nats for each token, as the mean over the same windows of both, with its 95 % bootstrap \
interval, which must be below 0, as must be the difference for each seed.\n";

/// The results of an experiment.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Section {
    pub(crate) title: String,
    /// What was done, in a sentence.
    pub(crate) about: String,
    pub(crate) tables: Vec<Table>,
    pub(crate) claims: Vec<Claim>,
    /// The dense model.
    pub(crate) dense: Losses,
    pub(crate) bars: Vec<Bar>,
}

/// A table of text.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Table(Vec<Vec<String>>);

/// A model in a chart.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Bar {
    pub(crate) label: String,
    /// Of each seed, the perplexity of the held-out text.
    pub(crate) eval: Vec<f64>,
    /// Of each seed, that of the other text, if there is one.
    pub(crate) drift: Vec<f64>,
}

impl Table {
    pub(crate) fn new(header: &[&str]) -> Self {
        Self(vec![header.iter().map(ToString::to_string).collect()])
    }

    pub(crate) fn row<const N: usize>(&mut self, cells: [String; N]) {
        debug_assert_eq!(N, self.0[0].len(), "cells of a row");
        self.0.push(cells.into());
    }
}

impl Bar {
    /// A model, tuned with several seeds or not at all.
    pub(crate) fn new(label: impl Into<String>, seeds: &[Losses]) -> Self {
        let (eval, drift) = perplexities(seeds);
        let is_finite = |of: &f64| of.is_finite();
        Self {
            label: label.into(),
            eval: eval.into_iter().filter(is_finite).collect(),
            drift: drift.into_iter().filter(is_finite).collect(),
        }
    }
}

/// The perplexities of each seed on both texts.
fn perplexities(seeds: &[Losses]) -> (Vec<f64>, Vec<f64>) {
    let drift = seeds.iter().filter_map(Losses::drift).collect();
    (seeds.iter().map(Losses::perplexity).collect(), drift)
}

/// The perplexities on both texts as cells of a table.
pub(crate) fn cells(seeds: &[Losses]) -> [String; 2] {
    let (eval, drift) = perplexities(seeds);
    [eval, drift].map(|values| spread(&values))
}

/// A learning rate, with a mark if it is at an end of those that were tried.
pub(crate) fn rate(search: &Search) -> String {
    let tried = search.tried.iter().map(|tried| tried.rate);
    let (least, most) = range(&tried.collect::<Vec<_>>());
    let mark = if search.rate == least || search.rate == most {
        " *"
    } else {
        ""
    };
    format!("{:.1e}{mark}", search.rate)
}

/// The mean; none of none.
pub(crate) fn mean(of: &[f64]) -> Option<f64> {
    (!of.is_empty()).then(|| of.iter().sum::<f64>() / of.len() as f64)
}

/// The least and the largest.
pub(crate) fn range(of: &[f64]) -> (f64, f64) {
    let fold = |with: fn(f64, f64) -> f64, from| of.iter().copied().fold(from, with);
    (
        fold(f64::min, f64::INFINITY),
        fold(f64::max, f64::NEG_INFINITY),
    )
}

/// Writes the report of all experiments that the run has, and returns its text.
///
/// # Errors
/// If a section cannot be read, or a file not written.
pub(crate) fn write(lab: &Lab) -> Result<String> {
    let sections = lab.run.sections()?;
    let mut text = format!("# The experiments with {}\n\n", lab.args.model.name());
    writeln!(text, "{}", INTRODUCTION)?;
    let setup = lab.run.setup()?;
    for (name, value) in &setup {
        writeln!(text, "* {name}: `{value}`")?;
    }
    let mut files = Vec::new();
    for (experiment, section) in &sections {
        let name = format!("{}.svg", experiment.name());
        writeln!(text, "\n## {}\n\n{}\n", section.title, section.about)?;
        for table in &section.tables {
            writeln!(text, "{}", table::markdown(&table.0))?;
        }
        if !section.bars.is_empty() {
            writeln!(text, "![{}]({name})\n", section.title)?;
            files.push((name, chart::svg(section)));
        }
        text.push_str(&claims(&section.claims));
    }
    let json = json!({
        "setup": setup,
        "cells": lab.run.cells()?,
        "sections": sections.iter().map(|(of, section)| (of.name(), section)).collect::<Vec<_>>(),
    });
    files.push((
        "report.json".into(),
        serde_json::to_string_pretty(&json)? + "\n",
    ));
    files.push(("report.md".into(), text.clone()));
    interrupt::uninterrupted(|| {
        files
            .iter()
            .try_for_each(|(name, text)| lab.run.write(name, text))
    })?;
    Ok(text)
}

/// The claims of a section as text.
fn claims(claims: &[Claim]) -> String {
    let mut text = String::new();
    for claim in claims {
        let mark = match claim.verdict {
            Verdict::NotTestable => claim.verdict.name().to_string(),
            verdict => format!("**{}**", verdict.name()),
        };
        text += &format!("* {} ({}): {mark}.\n", claim.text, claim.source);
        for evidence in &claim.evidence {
            text += &format!("  * {evidence}\n");
        }
    }
    text
}
