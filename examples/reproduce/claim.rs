//! Claims of papers, and whether the cells show them.

use examples::outcome::Result;
use serde::{Deserialize, Serialize};

use crate::losses::{Losses, above, mean};

/// A published claim, and what the run says about it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Claim {
    /// What is claimed.
    pub(crate) text: String,
    /// The paper.
    pub(crate) source: String,
    pub(crate) verdict: Verdict,
    /// The numbers that the verdict is drawn from, or why there is none.
    pub(crate) evidence: Vec<String>,
}

/// What a run says about a claim.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Verdict {
    Shown,
    NotShown,
    NotTestable,
}

impl Verdict {
    /// The verdict as the report has it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Shown => "shown",
            Self::NotShown => "not shown",
            Self::NotTestable => "not testable here",
        }
    }
}

/// Two models that a claim compares, each tuned with several seeds or not at all: the first is said to have the
/// lower loss.
pub(crate) struct Pair<'a> {
    /// What they are, such as `3 bits, group 64`.
    pub(crate) name: String,
    pub(crate) lower: &'a [Losses],
    pub(crate) higher: &'a [Losses],
}

/// The least number of windows whose bootstrap interval is taken as one.
const MIN_WINDOWS: usize = 8;

impl Claim {
    /// The claim that in every pair the first model has the lower loss.
    ///
    /// It is shown if in every pair the interval of the difference over the windows is below 0, and so is the
    /// difference for each of the seeds.
    ///
    /// # Errors
    /// If there are no windows.
    pub(crate) fn lower(text: &str, source: &str, pairs: &[Pair]) -> Result<Self> {
        let Some(first) = pairs.first() else {
            let why = "the run has no cells that it compares";
            return Ok(Self::not_testable(text, source, why));
        };
        let n_windows = first.lower[0].eval.0.len();
        if n_windows < MIN_WINDOWS {
            let why = format!("{n_windows} windows are too few for an interval");
            return Ok(Self::not_testable(text, source, &why));
        }
        let mut evidence = Vec::new();
        let mut is_shown = true;
        for pair in pairs {
            let (is_lower, found) = pair.compare()?;
            is_shown &= is_lower;
            evidence.push(format!("{}: {found}", pair.name));
        }
        Ok(Self::of(text, source, is_shown, evidence))
    }

    /// A claim that numbers show or do not.
    pub(crate) fn of(text: &str, source: &str, is_shown: bool, evidence: Vec<String>) -> Self {
        Self {
            text: text.into(),
            source: source.into(),
            verdict: if is_shown {
                Verdict::Shown
            } else {
                Verdict::NotShown
            },
            evidence,
        }
    }

    /// A claim that a run cannot show, and why not.
    pub(crate) fn not_testable(text: &str, source: &str, why: &str) -> Self {
        Self {
            text: text.into(),
            source: source.into(),
            verdict: Verdict::NotTestable,
            evidence: vec![why.into()],
        }
    }
}

impl Pair<'_> {
    /// Whether the first is lower, and the numbers.
    fn compare(&self) -> Result<(bool, String)> {
        let Some(difference) = above(self.lower, self.higher)? else {
            // A model that diverged is above every other.
            let found = match mean(self.lower).is_finite() {
                true => "the second one diverged",
                false => "the first one diverged",
            };
            return Ok((mean(self.lower).is_finite(), found.into()));
        };
        let seeds = self.lower.iter().zip(self.higher);
        let mut of_seeds = seeds.map(|(lower, higher)| lower.perplexity() < higher.perplexity());
        let is_lower = difference.upper < 0.0 && of_seeds.all(|is_lower| is_lower);
        let found = format!(
            "{:+.4} nats [{:+.4}, {:+.4}]",
            difference.value, difference.lower, difference.upper
        );
        Ok((is_lower, found))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::losses::Windows;

    fn losses(eval: impl Fn(usize) -> f64) -> Losses {
        Losses {
            eval: Windows((0..10).map(eval).collect()),
            drift: Windows(Vec::new()),
        }
    }

    fn pair<'a>(lower: &'a [Losses], higher: &'a [Losses]) -> Pair<'a> {
        Pair {
            name: "a".into(),
            lower,
            higher,
        }
    }

    fn verdict(pairs: &[Pair]) -> Verdict {
        Claim::lower("", "", pairs).unwrap().verdict
    }

    #[test]
    fn a_claim_is_shown_by_every_pair_or_not() {
        let low = [losses(|i| i as f64)];
        let high = [losses(|i| i as f64 + 0.1 + 0.01 * i as f64)];
        // Lower in the mean, but not in every resample.
        let mixed = [losses(|i| i as f64 + if i == 0 { 2.0 } else { -0.1 })];
        assert_eq!(verdict(&[pair(&low, &high)]), Verdict::Shown);
        assert_eq!(verdict(&[pair(&high, &low)]), Verdict::NotShown);
        assert!(mixed[0].perplexity() > low[0].perplexity());
        assert_eq!(verdict(&[pair(&low, &mixed)]), Verdict::NotShown);
        let both = [pair(&low, &high), pair(&low, &mixed)];
        assert_eq!(verdict(&both), Verdict::NotShown);
        assert_eq!(verdict(&[]), Verdict::NotTestable);
    }

    /// What is lower in the mean of the seeds must be lower for each.
    #[test]
    fn a_claim_is_shown_by_every_seed_or_not() {
        let high = [losses(|_| 2.0), losses(|_| 1.0)];
        let low = [losses(|_| 1.0), losses(|_| 1.1)];
        assert_eq!(verdict(&[pair(&low, &high)]), Verdict::NotShown);
        assert_eq!(verdict(&[pair(&low[..1], &high[..1])]), Verdict::Shown);
    }

    #[test]
    fn a_model_that_diverged_is_above_every_other() {
        let fine = [losses(|i| i as f64)];
        let diverged = [losses(|_| f64::INFINITY)];
        assert_eq!(verdict(&[pair(&fine, &diverged)]), Verdict::Shown);
        assert_eq!(verdict(&[pair(&diverged, &fine)]), Verdict::NotShown);
        assert_eq!(verdict(&[pair(&diverged, &diverged)]), Verdict::NotShown);
    }

    #[test]
    fn few_windows_show_nothing() {
        let few = |loss: f64| {
            [Losses {
                eval: Windows(vec![loss; MIN_WINDOWS - 1]),
                drift: Windows(Vec::new()),
            }]
        };
        assert_eq!(verdict(&[pair(&few(1.0), &few(2.0))]), Verdict::NotTestable);
    }
}
