//! Statistics with confidence intervals.

use rand::RngExt;
use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::error::{Error, Result, setting};

#[cfg(test)]
mod tests;

/// A statistic with its confidence interval.
///
/// In JSON a number that is not finite is `null`, which reads as NaN.
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
    /// The number of items. The interval of one item is a point without meaning.
    pub n: usize,
}

impl Estimate {
    /// The estimate of a monotone function of the statistic, such as `exp` of a mean loss.
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

/// The percentile bootstrap.
///
/// A resample draws as many items as there are, with replacement. The interval lies between two
/// quantiles of the statistic over resamples, interpolated linearly as in `numpy.percentile`. A seed
/// draws the same resamples for every model that is evaluated on as many items.
///
/// Efron 1979, "Bootstrap methods: another look at the jackknife".
///
/// # Examples
/// ```
/// use evaluate::{Bootstrap, Error};
///
/// let accuracy = Bootstrap::new().with_seed(7).mean(&[1.0, 1.0, 0.0, 1.0])?;
/// assert_eq!((accuracy.value, accuracy.n), (0.75, 4));
/// assert!(accuracy.lower < 0.75 && 0.75 < accuracy.upper);
///
/// let error = Bootstrap::new().mean(&[1.0, f64::NAN]).unwrap_err();
/// assert!(matches!(error, Error::NonFiniteItem { index: 1, .. }));
/// # Ok::<(), evaluate::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Bootstrap {
    resamples: usize,
    confidence: f64,
    seed: u64,
}

impl Default for Bootstrap {
    fn default() -> Self {
        Self::new()
    }
}

impl Bootstrap {
    /// A bootstrap of 1000 resamples, a confidence of 0.95 and the seed 0.
    pub fn new() -> Self {
        Self {
            resamples: 1000,
            confidence: 0.95,
            seed: 0,
        }
    }

    /// The number of resamples, at least 1.
    pub fn with_resamples(mut self, resamples: usize) -> Self {
        self.resamples = resamples;
        self
    }

    /// The fraction of resamples in the interval, between 0 and 1.
    pub fn with_confidence(mut self, confidence: f64) -> Self {
        self.confidence = confidence;
        self
    }

    /// The seed of the resamples.
    pub fn with_seed(mut self, seed: u64) -> Self {
        self.seed = seed;
        self
    }

    /// The number of resamples.
    pub fn resamples(&self) -> usize {
        self.resamples
    }

    /// The fraction of resamples in the interval.
    pub fn confidence(&self) -> f64 {
        self.confidence
    }

    /// The mean of the items.
    ///
    /// # Errors
    /// [`Error::NoItems`]; [`Error::NonFiniteItem`]; [`peft::Error::Setting`] for a setting that is out of
    /// its range.
    pub fn mean(&self, items: &[f64]) -> Result<Estimate> {
        self.ratio(items, &vec![1.0; items.len()])
    }

    /// The sum of the numerators over the sum of the denominators.
    ///
    /// An example is the mean loss of a token over documents of different lengths: a document is drawn
    /// with all its tokens.
    ///
    /// # Errors
    /// As [`mean`](Self::mean); [`Error::Unpaired`]; [`Error::Denominator`].
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

    /// An unbiased statistic of `n` items; `of` computes it from the indices of the drawn items.
    ///
    /// # Errors
    /// [`Error::NoItems`]; [`peft::Error::Setting`].
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

/// The expected calibration error of groups of items, such as windows, which are drawn as a whole.
///
/// The error of a resample is biased upwards, since it has fewer distinct items. The interval is
/// therefore the basic one: the quantiles of the resamples, reflected at the value (Davison and Hinkley
/// 1997, §5.2.1).
///
/// # Errors
/// As [`calibration`] and [`Bootstrap::statistic`].
pub fn calibration_error(
    groups: &[Vec<(f64, bool)>],
    n_bins: usize,
    bootstrap: &Bootstrap,
) -> Result<Estimate> {
    let value = calibration(&groups.concat(), n_bins)?.ece;
    let drawn = bootstrap.statistic(groups.len(), |drawn| {
        let items: Vec<_> = drawn.iter().flat_map(|&at| &groups[at]).copied().collect();
        // A resample may consist of groups without items.
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

/// The quantile of sorted values, of which there must be one.
fn quantile(sorted: &[f64], part: f64) -> f64 {
    let position = part * (sorted.len() - 1) as f64;
    let below = position.floor() as usize;
    let above = (below + 1).min(sorted.len() - 1);
    sorted[below] + (position - position.floor()) * (sorted[above] - sorted[below])
}

/// The number of bins of a [`Calibration`] in Guo et al. and most later papers.
pub const CALIBRATION_BINS: usize = 15;

/// The differences between confidences and accuracies, by [`calibration`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Calibration {
    /// The expected calibration error: `Σ n_bin / n |accuracy - confidence|` over the bins.
    pub ece: f64,
    /// The number of items.
    pub n: usize,
    /// The bins with items, from low to high confidence: a reliability table.
    pub bins: Vec<CalibrationBin>,
}

/// The items with confidences in one range.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct CalibrationBin {
    /// The lower end of the range, which only the first bin includes.
    pub above: f64,
    /// The upper end of the range, inclusive.
    pub at_most: f64,
    /// The number of items, at least 1.
    pub n: usize,
    /// The mean confidence of the items.
    pub confidence: f64,
    /// The fraction of the items that are right.
    pub accuracy: f64,
}

/// The expected calibration error of items, each with a confidence and whether it is right.
///
/// Bins have equal widths, `((b - 1) / n_bins, b / n_bins]`; usually there are [`CALIBRATION_BINS`].
///
/// Guo et al. 2017, arXiv:1706.04599.
///
/// # Errors
/// [`Error::NoItems`]; [`Error::Confidence`] for one outside of 0 to 1; [`peft::Error::Setting`] if
/// `n_bins` is 0.
///
/// # Examples
/// ```
/// use evaluate::{Error, calibration};
///
/// let found = calibration(&[(0.9, true), (0.7, false)], 1)?;
/// assert!((found.ece - 0.3).abs() < 1e-12);
///
/// let error = calibration(&[(1.5, true)], 1).unwrap_err();
/// assert!(matches!(error, Error::Confidence { index: 0, .. }));
/// # Ok::<(), evaluate::Error>(())
/// ```
pub fn calibration(items: &[(f64, bool)], n_bins: usize) -> Result<Calibration> {
    if n_bins == 0 {
        return Err(setting("n_bins", 0, "at least 1"));
    }
    if items.is_empty() {
        return Err(Error::NoItems);
    }
    // Compared with the borders: a product with the number of bins may round across one.
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
