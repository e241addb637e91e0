//! Statistics of an evaluation, each with its uncertainty.

use rand::RngExt;
use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::error::{Error, Result, setting};

#[cfg(test)]
mod tests;

/// A statistic with its confidence interval.
///
/// In JSON a number that is not finite is `null`, which is read back as NaN.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Estimate {
    /// The statistic of all items.
    #[serde(serialize_with = "to_json", deserialize_with = "from_json")]
    pub value: f64,
    /// The lower end of the interval.
    #[serde(serialize_with = "to_json", deserialize_with = "from_json")]
    pub lower: f64,
    /// The upper end.
    #[serde(serialize_with = "to_json", deserialize_with = "from_json")]
    pub upper: f64,
    /// Items. One item has no spread: its interval is a point, and says nothing.
    pub n: usize,
}

impl Estimate {
    /// The same of a monotone function of the statistic, such as `exp` of a mean loss.
    ///
    /// A decreasing function exchanges the ends of the interval.
    pub fn map(self, function: impl Fn(f64) -> f64) -> Self {
        let (a, b) = (function(self.lower), function(self.upper));
        Self {
            value: function(self.value),
            lower: a.min(b),
            upper: a.max(b),
            n: self.n,
        }
    }
}

fn to_json<S: Serializer>(value: &f64, serializer: S) -> Result<S::Ok, S::Error> {
    value.is_finite().then_some(*value).serialize(serializer)
}

fn from_json<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or(f64::NAN))
}

/// Settings of the percentile bootstrap.
///
/// Items are drawn with replacement, as many as there are, and the statistic is taken of each such
/// resample. The interval is between two quantiles of those, with linear interpolation as in
/// `numpy.percentile`. One seed draws the same items for every model that is measured on as many.
///
/// Efron 1979, "Bootstrap methods: another look at the jackknife".
///
/// ```
/// # use evaluate::Bootstrap;
/// let right = [1.0, 1.0, 0.0, 1.0];
/// let accuracy = Bootstrap::new().with_seed(7).mean(&right)?;
/// assert_eq!((accuracy.value, accuracy.n), (0.75, 4));
/// assert!(accuracy.lower < 0.75 && 0.75 < accuracy.upper);
/// # Ok::<(), evaluate::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Bootstrap {
    /// Resamples: at least 1.
    pub resamples: usize,
    /// The part of the resamples inside of the interval, between 0 and 1.
    pub confidence: f64,
    /// What the draws depend on.
    pub seed: u64,
}

impl Default for Bootstrap {
    fn default() -> Self {
        Self::new()
    }
}

impl Bootstrap {
    /// 1000 resamples, 95 % confidence, seed 0.
    pub fn new() -> Self {
        Self {
            resamples: 1000,
            confidence: 0.95,
            seed: 0,
        }
    }

    /// Resamples: at least 1.
    pub fn with_resamples(mut self, resamples: usize) -> Self {
        self.resamples = resamples;
        self
    }

    /// The part of the resamples inside of the interval, between 0 and 1.
    pub fn with_confidence(mut self, confidence: f64) -> Self {
        self.confidence = confidence;
        self
    }

    /// What the draws depend on.
    pub fn with_seed(mut self, seed: u64) -> Self {
        self.seed = seed;
        self
    }

    /// The mean of the items.
    ///
    /// # Errors
    /// [`Error::NoItems`], [`Error::NonFiniteItem`], or [`peft::Error::Setting`].
    pub fn mean(&self, items: &[f64]) -> Result<Estimate> {
        self.ratio(items, &vec![1.0; items.len()])
    }

    /// The sum of the numerators over the sum of the denominators.
    ///
    /// The mean loss of a token, for one, where items are documents of different lengths: an item is
    /// drawn with its tokens.
    ///
    /// # Errors
    /// As [`mean`](Self::mean), [`Error::Unpaired`], or [`Error::Denominator`].
    pub fn ratio(&self, numerators: &[f64], denominators: &[f64]) -> Result<Estimate> {
        let (n, found) = (numerators.len(), denominators.len());
        if n != found {
            return Err(Error::Unpaired {
                of: "numerators",
                expected: n,
                and: "denominators",
                found,
            });
        }
        for (index, (&value, &denominator)) in numerators.iter().zip(denominators).enumerate() {
            if !value.is_finite() {
                return Err(Error::NonFiniteItem { index, value });
            }
            if !(denominator.is_finite() && denominator > 0.0) {
                let value = denominator;
                return Err(Error::Denominator { index, value });
            }
        }
        self.statistic(n, |drawn| {
            ratio_of_sums(drawn.iter().map(|&at| (numerators[at], denominators[at])))
        })
    }

    /// Any statistic of `n` items that has no bias, given the places of those to take it of.
    ///
    /// # Errors
    /// [`Error::NoItems`] or [`peft::Error::Setting`].
    pub fn statistic(&self, n: usize, of: impl Fn(&[usize]) -> f64) -> Result<Estimate> {
        self.check()?;
        if n == 0 {
            return Err(Error::NoItems);
        }
        let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
        let mut drawn = vec![0; n];
        let mut resampled: Vec<f64> = (0..self.resamples)
            .map(|_| {
                drawn.fill_with(|| rng.random_range(0..n));
                of(&drawn)
            })
            .collect();
        resampled.sort_by(f64::total_cmp);
        let tail = (1.0 - self.confidence) / 2.0;
        let all: Vec<usize> = (0..n).collect();
        Ok(Estimate {
            value: of(&all),
            lower: quantile(&resampled, tail),
            upper: quantile(&resampled, 1.0 - tail),
            n,
        })
    }

    fn check(&self) -> Result<()> {
        if self.resamples == 0 {
            return Err(setting("resamples", 0, "at least 1"));
        }
        if !(self.confidence > 0.0 && self.confidence < 1.0) {
            let expected = "between 0 and 1, exclusive";
            return Err(setting("confidence", self.confidence, expected));
        }
        Ok(())
    }
}

/// The expected calibration error of groups of items, windows of text for example, which are drawn
/// whole.
///
/// Resamples are worse calibrated than the items, as any fewer items look worse: the interval is the
/// basic one, whose ends are as far from the value as those of the resamples are on the other side
/// (Davison and Hinkley 1997, §5.2.1).
///
/// # Errors
/// As [`calibration`], or [`peft::Error::Setting`] of the bootstrap.
pub fn calibration_error(
    groups: &[Vec<(f64, bool)>],
    n_bins: usize,
    bootstrap: &Bootstrap,
) -> Result<Estimate> {
    let value = calibration(&groups.concat(), n_bins)?.ece;
    let drawn = bootstrap.statistic(groups.len(), |drawn| {
        let items: Vec<_> = drawn.iter().flat_map(|&at| &groups[at]).copied().collect();
        // Groups without items may be all that was drawn.
        calibration(&items, n_bins).map_or(value, |found| found.ece)
    })?;
    Ok(Estimate {
        value,
        lower: (2.0 * value - drawn.upper).max(0.0),
        upper: 2.0 * value - drawn.lower,
        n: drawn.n,
    })
}

fn ratio_of_sums(items: impl Iterator<Item = (f64, f64)>) -> f64 {
    let (numerator, denominator) = items.fold((0.0, 0.0), |(a, b), (x, y)| (a + x, b + y));
    numerator / denominator
}

/// The quantile of sorted values, of which there is at least one.
fn quantile(sorted: &[f64], part: f64) -> f64 {
    let place = part * (sorted.len() - 1) as f64;
    let below = place.floor() as usize;
    let above = (below + 1).min(sorted.len() - 1);
    sorted[below] + (place - place.floor()) * (sorted[above] - sorted[below])
}

/// The bins of a [`Calibration`] that Guo et al. and most papers since take.
pub const CALIBRATION_BINS: usize = 15;

/// How far confidences are from accuracies, by [`calibration`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Calibration {
    /// The expected calibration error: `Σ n_bin / n |accuracy - confidence|` over the bins.
    pub ece: f64,
    /// Items.
    pub n: usize,
    /// The bins that have items, from low to high confidence: a reliability table.
    pub bins: Vec<CalibrationBin>,
}

/// The items whose confidence is in one range.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct CalibrationBin {
    /// What the confidences are above; the first bin has 0 too.
    pub above: f64,
    /// What they are at most.
    pub at_most: f64,
    /// Items; at least 1.
    pub n: usize,
    /// Their mean confidence.
    pub confidence: f64,
    /// The part of them that was right.
    pub accuracy: f64,
}

/// The expected calibration error of items, each a confidence and whether the item was right.
///
/// Bins are of equal width, `((b - 1) / n_bins, b / n_bins]`, [`CALIBRATION_BINS`] as a rule.
///
/// Guo et al. 2017, arXiv:1706.04599.
///
/// # Errors
/// [`Error::NoItems`], [`Error::Confidence`] for one that is not in 0 to 1, or [`peft::Error::Setting`] for
/// no bins.
pub fn calibration(items: &[(f64, bool)], n_bins: usize) -> Result<Calibration> {
    if n_bins == 0 {
        return Err(setting("n_bins", 0, "at least 1"));
    }
    if items.is_empty() {
        return Err(Error::NoItems);
    }
    // By the borders themselves: a product with the number of bins may round across one.
    let border = |bin: usize| bin as f64 / n_bins as f64;
    let uppers: Vec<f64> = (1..=n_bins).map(border).collect();
    let mut sums = vec![(0, 0.0, 0); n_bins];
    for (index, &(confidence, is_right)) in items.iter().enumerate() {
        if !(0.0..=1.0).contains(&confidence) {
            return Err(Error::Confidence { index, confidence });
        }
        let bin = uppers.partition_point(|&upper| upper < confidence);
        sums[bin].0 += 1;
        sums[bin].1 += confidence;
        sums[bin].2 += usize::from(is_right);
    }
    let held = sums.iter().enumerate().filter(|(_, sums)| sums.0 > 0);
    let bins: Vec<CalibrationBin> = held
        .map(|(bin, &(n, confidence, n_right))| CalibrationBin {
            above: border(bin),
            at_most: border(bin + 1),
            n,
            confidence: confidence / n as f64,
            accuracy: n_right as f64 / n as f64,
        })
        .collect();
    let n = items.len();
    let gap = |bin: &CalibrationBin| bin.n as f64 * (bin.accuracy - bin.confidence).abs();
    let ece = bins.iter().map(gap).sum::<f64>() / n as f64;
    Ok(Calibration { ece, n, bins })
}
