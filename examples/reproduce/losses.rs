//! The losses of a model on two texts.

use evaluate::{Bootstrap, Estimate};
use examples::outcome::Result;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// The mean loss of a token in nats, of each window of two texts.
///
/// The losses of a model that diverged are infinite.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Losses {
    /// Of held-out text of the kind that is tuned on.
    pub(crate) eval: Windows,
    /// Of text of another kind; empty if there is none.
    pub(crate) drift: Windows,
}

/// The losses of the windows of a text. In JSON, those that are not finite are `null`.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Windows(pub(crate) Vec<f64>);

impl Serialize for Windows {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        let finite = self.0.iter().map(|loss| loss.is_finite().then_some(*loss));
        serializer.collect_seq(finite)
    }
}

impl<'de> Deserialize<'de> for Windows {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        let losses = Vec::<Option<f64>>::deserialize(deserializer)?;
        let losses = losses.into_iter().map(|loss| loss.unwrap_or(f64::INFINITY));
        Ok(Self(losses.collect()))
    }
}

impl Windows {
    /// The losses of a model that diverged.
    pub(crate) fn diverged(n: usize) -> Self {
        Self(vec![f64::INFINITY; n])
    }

    fn mean(&self) -> f64 {
        self.0.iter().sum::<f64>() / self.0.len() as f64
    }
}

impl Losses {
    /// The perplexity of the held-out text.
    pub(crate) fn perplexity(&self) -> f64 {
        self.eval.mean().exp()
    }

    /// The perplexity of the other text, if there is one.
    pub(crate) fn drift(&self) -> Option<f64> {
        (!self.drift.0.is_empty()).then(|| self.drift.mean().exp())
    }

    /// The furthest that the loss of a window, of either text, is from another model's; infinite if one diverged.
    pub(crate) fn furthest(&self, other: &Self) -> f64 {
        let windows = self.eval.0.iter().chain(&self.drift.0);
        let others = other.eval.0.iter().chain(&other.drift.0);
        let differences = windows.zip(others).map(|(a, b)| match (a - b).abs() {
            // Of models that diverged.
            difference if difference.is_nan() => f64::INFINITY,
            difference => difference,
        });
        differences.fold(0.0, f64::max)
    }
}

/// The mean loss of held-out text, over seeds; infinite if one diverged.
pub(crate) fn mean(seeds: &[Losses]) -> f64 {
    let all = seeds.iter().map(|losses| losses.eval.mean());
    all.sum::<f64>() / seeds.len() as f64
}

/// How much the loss of held-out text of one model is above another's, each tuned with several seeds or none,
/// with an interval over the windows, which are the same for both; none if one diverged.
pub(crate) fn above(first: &[Losses], second: &[Losses]) -> Result<Option<Estimate>> {
    let (first, second) = (by_window(first), by_window(second));
    let differences = first.iter().zip(&second).map(|(a, b)| a - b);
    let differences: Vec<f64> = differences.collect();
    if differences.iter().any(|difference| !difference.is_finite()) {
        return Ok(None);
    }
    let bootstrap = Bootstrap::new().with_resamples(10_000);
    Ok(Some(bootstrap.mean(&differences)?))
}

/// The mean over seeds of each window's loss.
fn by_window(seeds: &[Losses]) -> Vec<f64> {
    let n_windows = seeds[0].eval.0.len();
    let at = |at: usize| seeds.iter().map(|losses| losses.eval.0[at]).sum::<f64>();
    (0..n_windows).map(|i| at(i) / seeds.len() as f64).collect()
}
