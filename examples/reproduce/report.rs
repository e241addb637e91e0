//! The report: Markdown, JSON and a chart for each experiment.

use std::fmt::Write as _;

use examples::outcome::Result;
use examples::{interrupt, table};
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::chart;
use crate::claim::{Claim, Verdict};
use crate::lab::{Lab, Losses};

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
    pub(crate) fn new(label: impl Into<String>, seeds: &[&Losses]) -> Self {
        let drift = seeds.iter().filter_map(|losses| losses.drift());
        Self {
            label: label.into(),
            eval: seeds.iter().map(|losses| losses.perplexity()).collect(),
            drift: drift.collect(),
        }
    }
}

/// The mean of perplexities, and half of their range if there are several.
pub(crate) fn spread(of: &[f64]) -> String {
    let Some(mean) = mean(of) else {
        return "-".into();
    };
    let range = range(of);
    match of.len() {
        1 => format!("{mean:.3}"),
        _ => format!("{mean:.3} ± {:.3}", (range.1 - range.0) / 2.0),
    }
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
    let args = lab.args;
    let mut text = format!("# The experiments with {}\n\n", args.model.name());
    let kinds = match lab.args.seed.len() {
        1 => String::new(),
        n => format!(" Numbers of {n} seeds are their mean ± half of their range."),
    };
    writeln!(
        text,
        "Perplexities over at most {} windows of {} tokens of each text, in the protocol of OPTQ. Models are tuned for {} steps of {} windows of {} tokens, at a rate that {} steps at each of four rates chose.{kinds} A difference of losses is the mean over the same windows of both models, in nats, with its 95 % bootstrap interval.",
        args.eval_windows, args.seq_len, args.steps, args.batch, args.tune_len, args.search_steps,
    )?;
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
        "version": env!("CARGO_PKG_VERSION"),
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
