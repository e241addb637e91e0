//! Claims of papers, and whether the cells show them.

use evaluate::Estimate;
use examples::outcome::Result;
use serde::{Deserialize, Serialize};

use crate::lab::Losses;

/// A published claim, and what the run says about it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Claim {
    /// What is claimed.
    pub(crate) text: String,
    /// The paper.
    pub(crate) source: String,
    pub(crate) verdict: Verdict,
    /// The numbers that the verdict is drawn from.
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
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Shown => "shown",
            Self::NotShown => "not shown",
            Self::NotTestable => "not testable here",
        }
    }

    fn of(is_shown: bool) -> Self {
        if is_shown {
            Self::Shown
        } else {
            Self::NotShown
        }
    }
}

/// Two models that a claim compares: the first is said to have the lower loss.
pub(crate) struct Pair<'a> {
    /// What they are, such as `3 bits, group 64`.
    pub(crate) name: String,
    pub(crate) lower: &'a Losses,
    pub(crate) higher: &'a Losses,
}

impl Claim {
    /// The claim that in every pair the first model has the lower loss.
    ///
    /// It is shown if the interval of the difference over the windows, the same for both models, is below 0 in
    /// every pair.
    ///
    /// # Errors
    /// If a loss is not finite.
    pub(crate) fn lower(text: &str, source: &str, pairs: &[Pair]) -> Result<Self> {
        let mut evidence = Vec::new();
        let mut is_shown = !pairs.is_empty();
        for Pair {
            name,
            lower,
            higher,
        } in pairs
        {
            let difference = lower.above(higher)?;
            is_shown &= difference.upper < 0.0;
            evidence.push(format!("{name}: {}", interval(difference)));
        }
        Ok(Self::of(text, source, is_shown, evidence))
    }

    /// A claim that numbers show or do not.
    pub(crate) fn of(text: &str, source: &str, is_shown: bool, evidence: Vec<String>) -> Self {
        Self {
            text: text.into(),
            source: source.into(),
            verdict: Verdict::of(is_shown),
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

/// A difference of losses with its interval.
pub(crate) fn interval(of: Estimate) -> String {
    format!("{:+.4} nats [{:+.4}, {:+.4}]", of.value, of.lower, of.upper)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn losses(eval: &[f64]) -> Losses {
        Losses {
            eval: eval.into(),
            drift: Vec::new(),
        }
    }

    #[test]
    fn a_claim_is_shown_by_every_pair_or_not() {
        let low = losses(&[1.0, 2.0, 3.0, 4.0]);
        let high = losses(&[1.2, 2.1, 3.1, 4.3]);
        let mixed = losses(&[0.5, 2.5, 3.5, 3.6]);
        let pair = |lower, higher| Pair {
            name: "a".into(),
            lower,
            higher,
        };
        let verdict = |pairs: &[Pair]| Claim::lower("", "", pairs).unwrap().verdict;
        assert_eq!(verdict(&[pair(&low, &high)]), Verdict::Shown);
        assert_eq!(verdict(&[pair(&high, &low)]), Verdict::NotShown);
        // The mean is lower, but not in every resample.
        assert_eq!(verdict(&[pair(&low, &mixed)]), Verdict::NotShown);
        let both = [pair(&low, &high), pair(&low, &mixed)];
        assert_eq!(verdict(&both), Verdict::NotShown);
        assert_eq!(verdict(&[]), Verdict::NotShown);
    }
}
