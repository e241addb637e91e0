//! The option for a learning rate.

use std::str::FromStr;

use examples::outcome::Result;
use examples::texts::Texts;
use examples::{println, rate};
use models::Model;
use peft::FitConfig;

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

/// The steps at each rate.
const STEPS: usize = 20;

/// The batches that rates are compared on, at most.
const HELD_OUT: usize = 8;

/// Returns the rate around that of `fit` with the lowest loss after a short training.
///
/// The loss is that of the last training batches, which the short trainings leave out, so that the texts of the
/// evaluation choose nothing.
pub(crate) fn choose(model: &Model, texts: &Texts, fit: &FitConfig) -> Result<f64> {
    let n_held_out = HELD_OUT.min(texts.train.len() / 2);
    if n_held_out == 0 {
        return Err("--lr auto needs two training batches: take a smaller --batch".into());
    }
    let (train, held_out) = texts.train.split_at(texts.train.len() - n_held_out);
    let search = rate::search(model, train, held_out, fit, STEPS)?;
    if search.tried.iter().all(|tried| tried.loss.is_none()) {
        return Err("every learning rate of --lr auto ends in a loss that is not finite".into());
    }
    println!("{search}");
    Ok(search.rate)
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
