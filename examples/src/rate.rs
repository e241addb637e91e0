//! The choice of a learning rate by short trainings.

use std::fmt;

use models::Model;
use peft::{Batch, Evaluation, FitConfig};
use serde::{Deserialize, Serialize};

use crate::outcome::Result;
use crate::progress::Bar;

/// The rates that are tried, as factors of the default.
///
/// Not more than three times the default: a rate that is best for few steps is too high for many.
const FACTORS: [f64; 4] = [0.1, 0.3, 1.0, 3.0];

/// The short trainings at several rates.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Search {
    /// The rates, each with the loss after its training.
    pub tried: Vec<Tried>,
    /// The rate of the lowest loss, or the lowest rate if the training failed at all.
    pub rate: f64,
    /// The steps of each training.
    pub steps: usize,
    /// The held-out batches whose loss it is.
    pub n_held_out: usize,
}

/// A learning rate, and the loss on held-out batches after a short training.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Tried {
    /// The learning rate.
    pub rate: f64,
    /// The loss; none if the training failed at this rate.
    pub loss: Option<f64>,
}

/// Finds the rate around that of `fit` with the lowest loss on held-out batches after so many steps.
///
/// # Errors
/// As [`peft::fit`], but for losses that are not finite.
pub fn search(
    model: &Model,
    train: &[Batch],
    held_out: &[Batch],
    fit: &FitConfig,
    steps: usize,
) -> Result<Search> {
    let bar = Bar::new("learning rates", FACTORS.len() * steps, "steps")?;
    let evaluation = Evaluation::new(held_out.to_vec()).with_every(steps);
    let fit = fit.clone().with_steps(steps).with_warmup_steps(1);
    let fit = fit.with_evaluation(evaluation);
    let mut tried = Vec::new();
    for (at, factor) in FACTORS.into_iter().enumerate() {
        let rate = factor * fit.learning_rate();
        let loss = loss(model, train, &fit.clone().with_learning_rate(rate), &bar)?;
        bar.set((at + 1) * steps, "");
        tried.push(Tried { rate, loss });
    }
    let losses = tried.iter().filter_map(|of| Some((of.rate, of.loss?)));
    let best = losses.min_by(|a, b| a.1.total_cmp(&b.1));
    // The lowest is the most careful one where all fail.
    let rate = best.map_or(tried[0].rate, |(rate, _)| rate);
    Ok(Search {
        tried,
        rate,
        steps,
        n_held_out: held_out.len(),
    })
}

/// The loss after a short training, if it does not fail at this rate.
fn loss(model: &Model, train: &[Batch], fit: &FitConfig, bar: &Bar) -> Result<Option<f64>> {
    let done = peft::fit(&mut model.clone(), train, fit, |_, _| bar.step(""));
    match done {
        Ok(report) => Ok(report.best.map(|best| best.loss).filter(|l| l.is_finite())),
        Err(peft::Error::NonFinite { .. }) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

impl fmt::Display for Search {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let losses: Vec<String> = self.tried.iter().map(ToString::to_string).collect();
        write!(
            f,
            "loss on {} held-out batches after {} steps, by learning rate: {}; taken: {:e}",
            self.n_held_out,
            self.steps,
            losses.join(", "),
            self.rate
        )
    }
}

impl fmt::Display for Tried {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self.loss {
            Some(loss) => write!(f, "{:e} {loss:.4}", self.rate),
            None => write!(f, "{:e} fails", self.rate),
        }
    }
}
