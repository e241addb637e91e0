//! The choice of a learning rate by short trainings.

use std::fmt;
use std::str::FromStr;

use examples::outcome::Result;
use examples::println;
use examples::progress::Bar;
use examples::texts::Texts;
use models::Model;
use peft::{Batch, Evaluation, FitConfig};

/// A learning rate, or the choice of one.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Rate {
    Value(f64),
    /// By short trainings.
    Auto,
}

impl Rate {
    /// Its value, if it has one.
    pub(crate) fn value(self) -> Option<f64> {
        match self {
            Self::Value(rate) => Some(rate),
            Self::Auto => None,
        }
    }
}

impl FromStr for Rate {
    type Err = &'static str;

    fn from_str(text: &str) -> std::result::Result<Self, Self::Err> {
        match (text, text.parse()) {
            ("auto", _) => Ok(Self::Auto),
            (_, Ok(rate)) => Ok(Self::Value(rate)),
            _ => Err("expected a number, or `auto`"),
        }
    }
}

/// The rates that are tried, as factors of the default.
///
/// Not more than three times the default: a rate that is best for few steps is too high for many.
const FACTORS: [f64; 4] = [0.1, 0.3, 1.0, 3.0];

/// The steps of each of them.
const STEPS: usize = 20;

/// The batches that they are compared on, at most.
const HELD_OUT: usize = 8;

/// Returns the rate around that of `fit` with the lowest loss after a short training.
///
/// The loss is that of training batches which the short trainings leave out, so that the texts of the
/// evaluation choose nothing.
pub(crate) fn choose(model: &Model, texts: &Texts, fit: &FitConfig) -> Result<f64> {
    let n_held_out = HELD_OUT.min(texts.train.len() / 2);
    if n_held_out == 0 {
        return Err("--lr auto needs two training batches: take a smaller --batch".into());
    }
    let (train, held_out) = texts.train.split_at(texts.train.len() - n_held_out);
    let bar = Bar::new("learning rates", FACTORS.len() * STEPS, "steps")?;
    let evaluation = Evaluation::new(held_out.to_vec()).with_every(STEPS);
    let fit = fit.clone().with_steps(STEPS).with_warmup_steps(1);
    let fit = fit.with_evaluation(evaluation);
    let mut tried = Vec::new();
    for (at, factor) in FACTORS.into_iter().enumerate() {
        let rate = factor * fit.learning_rate();
        let loss = loss(model, train, &fit.clone().with_learning_rate(rate), &bar)?;
        bar.set((at + 1) * STEPS, "");
        tried.push(Tried { rate, loss });
    }
    drop(bar);
    let best = tried.iter().min_by(|a, b| a.loss.total_cmp(&b.loss));
    let best = best.filter(|best| best.loss.is_finite());
    let Some(best) = best else {
        return Err("every learning rate of --lr auto ends in a loss that is not finite".into());
    };
    let losses: Vec<String> = tried.iter().map(ToString::to_string).collect();
    println!(
        "loss on {n_held_out} training batches after {STEPS} steps without them, by learning rate: {}; taken: {:e}",
        losses.join(", "),
        best.rate
    );
    Ok(best.rate)
}

/// The loss after a short training; infinite if it fails at this rate.
fn loss(model: &Model, train: &[Batch], fit: &FitConfig, bar: &Bar) -> Result<f64> {
    let done = peft::fit(&mut model.clone(), train, fit, |_, _| bar.step(""));
    match done {
        Ok(report) => Ok(report.best.map_or(f64::INFINITY, |best| best.loss)),
        Err(peft::Error::NonFinite { .. }) => Ok(f64::INFINITY),
        Err(error) => Err(error.into()),
    }
}

struct Tried {
    rate: f64,
    loss: f64,
}

impl fmt::Display for Tried {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{:e} {:.4}", self.rate, self.loss)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_is_a_number_or_auto() {
        assert_eq!("1e-3".parse(), Ok(Rate::Value(1e-3)));
        assert_eq!("auto".parse(), Ok(Rate::Auto));
        assert!("fast".parse::<Rate>().is_err());
    }
}
