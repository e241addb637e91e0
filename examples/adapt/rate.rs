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

/// Returns the rate around that of `fit` with the lowest loss after a short training.
pub(crate) fn choose(model: &Model, texts: &Texts, fit: &FitConfig) -> Result<f64> {
    let search = rate::search(model, &texts.train, fit, STEPS)?;
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
