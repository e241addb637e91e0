//! Generation, token by token, with a KV cache.

use std::ops::ControlFlow;

use burn::tensor::{Int, Tensor, TensorData};
use peft::{Blocks, CausalLm, Spans};
use rand::RngExt;
use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};

use crate::kv_cache::KvCache;
use crate::positions::Positions;
use crate::{GenerationError, Model, Result};

/// The KV cache of a [`Model`], made by [`Model::cache`].
///
/// When the cache is full, its capacity doubles. Between reallocations tokens are written in place,
/// without a copy.
#[derive(Clone, Debug)]
pub struct Cache {
    blocks: Vec<KvCache>,
    /// The positions of `capacity` tokens; `None` before the first token.
    positions: Option<Positions>,
    capacity: usize,
    len: usize,
    max_len: usize,
}

impl Cache {
    /// The number of tokens in the cache.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the cache has no tokens.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The largest number of tokens.
    pub fn max_len(&self) -> usize {
        self.max_len
    }
}

impl Model {
    /// An empty cache for texts of up to `max_len` tokens.
    ///
    /// A model with rotary embeddings takes longer texts than it was trained for, as in transformers.
    ///
    /// # Errors
    /// [`peft::Error::TooLong`] for more than [`Blocks::max_positions`]; [`GenerationError::DynamicRope`]
    /// if a `dynamic` or `longrope` scaling changes rotations below `max_len`, since it rotates all keys
    /// again.
    pub fn cache(&self, max_len: usize) -> Result<Cache> {
        if let Some(max) = self.max_positions().filter(|&max| max_len > max) {
            return Err(peft::Error::TooLong { len: max_len, max }.into());
        }
        let max_cached = self.config().shape().max_cached;
        if let Some(max) = max_cached.filter(|&max| max_len > max) {
            return Err(GenerationError::DynamicRope { max_len, max }.into());
        }
        Ok(Cache {
            blocks: vec![KvCache::default(); self.n_blocks()],
            positions: None,
            capacity: 0,
            len: 0,
            max_len,
        })
    }

    /// The logits of the token after `tokens`, which follow those in the cache and are appended to it.
    ///
    /// # Shapes
    /// - `tokens`: `[batch, seq]`
    /// - result: `[batch, vocab]`
    ///
    /// # Errors
    /// [`GenerationError::NoTokens`], or [`GenerationError::CacheFull`] for more tokens than
    /// [`Cache::max_len`]. Then the cache is unchanged.
    ///
    /// # Panics
    /// If a token is not in the vocabulary, or the cache is that of a model of another shape or of
    /// another batch size.
    pub fn forward_cached(&self, tokens: Tensor<2, Int>, cache: &mut Cache) -> Result<Tensor<2>> {
        let [batch, seq] = tokens.dims();
        if batch * seq == 0 {
            return Err(GenerationError::NoTokens.into());
        }
        let (start, max_len) = (cache.len, cache.max_len);
        let len = start + seq;
        if len > max_len {
            return Err(GenerationError::CacheFull { len, max_len }.into());
        }
        assert_eq!(cache.blocks.len(), self.n_blocks(), "blocks of the cache");
        if len > cache.capacity || cache.positions.is_none() {
            cache.capacity = len.max(2 * cache.capacity).max(64).min(max_len);
            // No scaling depends on this length.
            let spans = Spans::whole(cache.capacity, &tokens.device());
            cache.positions = Some(self.positions(&spans));
        }
        let positions = cache.positions.as_ref().expect("made above");
        let positions = positions.narrow(start, seq);
        let logits = kernels::among_threads(&tokens.device(), || {
            let mut x = self.embed(tokens, &positions);
            for (block, of_block) in self.blocks().iter().zip(&mut cache.blocks) {
                of_block.capacity = cache.capacity;
                x = block.forward(x, &positions, Some(of_block));
            }
            let x = self.norm(x.narrow(1, seq - 1, 1)).squeeze_dim::<2>(1);
            self.head().logits(x)
        });
        cache.len = len;
        Ok(logits)
    }
}

/// The settings of [`generate`].
///
/// Without a temperature, the likeliest token is taken each time. With one, tokens are drawn: logits are
/// divided by the temperature, only the `top_k` likeliest tokens are kept, and of those only the fewest
/// likeliest whose probabilities add up to `top_p` (Holtzman et al. 2020, arXiv:1904.09751), as in
/// transformers.
///
/// The default takes the likeliest token up to 100 times; the tokens that end a text are known to
/// [`Pretrained::generate`](crate::Pretrained::generate).
///
/// # Examples
/// ```
/// use models::Generation;
///
/// assert_eq!(Generation::default(), Generation::new(100));
/// let sampled = Generation::default().with_temperature(0.8).with_top_p(0.95).with_seed(1);
/// sampled.check()?;
/// assert!(Generation::default().with_top_p(0.0).check().is_err());
/// # Ok::<(), models::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Generation {
    max_new_tokens: usize,
    temperature: f64,
    top_k: Option<usize>,
    top_p: f64,
    seed: u64,
    stop: Vec<u32>,
    stop_strings: Vec<String>,
}

impl Default for Generation {
    fn default() -> Self {
        Self::new(100)
    }
}

impl Generation {
    /// Settings that take the likeliest token up to `max_new_tokens` times.
    pub fn new(max_new_tokens: usize) -> Self {
        Self {
            max_new_tokens,
            temperature: 0.0,
            top_k: None,
            top_p: 1.0,
            seed: 0,
            stop: Vec::new(),
            stop_strings: Vec::new(),
        }
    }

    /// Sets the divisor of the logits, 0 by default: the likeliest token is taken.
    pub fn with_temperature(mut self, temperature: f64) -> Self {
        self.temperature = temperature;
        self
    }

    /// Sets the number of the likeliest tokens that are drawn from, `None` by default: all.
    pub fn with_top_k(mut self, top_k: impl Into<Option<usize>>) -> Self {
        self.top_k = top_k.into();
        self
    }

    /// Sets the probability of the likeliest tokens that are drawn from, 1 by default: all.
    pub fn with_top_p(mut self, top_p: f64) -> Self {
        self.top_p = top_p;
        self
    }

    /// Sets the seed of the draws, 0 by default.
    pub fn with_seed(mut self, seed: u64) -> Self {
        self.seed = seed;
        self
    }

    /// Sets the tokens that end the text, none by default. The token that ends it is part of the result.
    pub fn with_stop(mut self, stop: impl IntoIterator<Item = u32>) -> Self {
        self.stop = stop.into_iter().collect();
        self
    }

    /// Sets the strings that end the text of [`Pretrained::generate`](crate::Pretrained::generate), none by
    /// default. They are found in the text of the new tokens with special tokens, as by transformers; empty
    /// ones are ignored.
    pub fn with_stop_strings<S: Into<String>>(mut self, stop: impl IntoIterator<Item = S>) -> Self {
        let stop = stop.into_iter().map(S::into);
        self.stop_strings = stop.filter(|stop| !stop.is_empty()).collect();
        self
    }

    /// The strings that end the text.
    pub(crate) fn stop_strings(&self) -> &[String] {
        &self.stop_strings
    }

    /// The tokens that end the text.
    pub(crate) fn stop(&self) -> &[u32] {
        &self.stop
    }

    /// Checks the settings.
    ///
    /// # Errors
    /// [`peft::Error::Setting`] with a setting that is out of range.
    pub fn check(&self) -> Result<()> {
        let refuse = |setting, value: String, expected| {
            let error = peft::Error::Setting {
                setting,
                value,
                expected,
            };
            Err(error.into())
        };
        if !(self.temperature.is_finite() && self.temperature >= 0.0) {
            let value = self.temperature.to_string();
            return refuse("temperature", value, "a number that is not negative");
        }
        if self.top_k == Some(0) {
            return refuse("top_k", "0".into(), "at least 1");
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return refuse("top_p", self.top_p.to_string(), "above 0 and at most 1");
        }
        Ok(())
    }

    /// Chooses a token by its logits.
    fn next(&self, logits: &[f32], rng: &mut ChaCha8Rng) -> u32 {
        if self.temperature == 0.0 {
            return largest(logits);
        }
        let kept = self.probabilities(logits);
        let total: f64 = kept.iter().map(|(_, p)| p).sum();
        let mut left = rng.random::<f64>() * total;
        for &(token, p) in &kept {
            left -= p;
            if left < 0.0 {
                return token;
            }
        }
        // A remainder of the rounding.
        kept[kept.len() - 1].0
    }

    /// The tokens that are drawn from with their probabilities, the likeliest first.
    fn probabilities(&self, logits: &[f32]) -> Vec<(u32, f64)> {
        let most = f64::from(logits[largest(logits) as usize]);
        let weight = |logit: f32| ((f64::from(logit) - most) / self.temperature).exp();
        let mut all: Vec<(u32, f64)> = (0..).zip(logits.iter().map(|&l| weight(l))).collect();
        // Of equal probabilities the first token comes first.
        all.sort_by(|(a, p), (b, q)| q.total_cmp(p).then(a.cmp(b)));
        if let Some(last) = self.top_k.and_then(|k| all.get(k - 1)).map(|&(_, p)| p) {
            all.truncate(all.partition_point(|&(_, p)| p >= last));
        }
        let sum: f64 = all.iter().map(|(_, p)| p).sum();
        let mut reached = 0.0;
        let n = all.iter().take_while(|(_, p)| {
            let is_kept = reached < self.top_p * sum;
            reached += p;
            is_kept
        });
        let n = n.count().max(1);
        all.truncate(n);
        // The largest weight is 1; others may underflow.
        all.retain(|&(_, p)| p > 0.0);
        all.into_iter().map(|(token, p)| (token, p / sum)).collect()
    }
}

/// Continues `prompt`. `on_token` is called with each new token, and may end the text.
///
/// # Errors
/// [`GenerationError::NoTokens`] for an empty prompt, [`peft::Error::Token`] for a token outside of the
/// vocabulary, [`peft::Error::Setting`], [`GenerationError::NonFiniteLogits`], or as [`Model::cache`].
///
/// # Examples
/// ```
/// use std::ops::ControlFlow;
///
/// use models::{Generation, Model, OptConfig, generate};
///
/// let config = OptConfig::default().with_num_hidden_layers(1).with_vocab_size(16);
/// let model = Model::init(config, 0, &burn::tensor::Device::flex());
/// let settings = Generation::new(4).with_temperature(0.8).with_top_k(5);
/// let new = generate(&model, &[3, 1], &settings, |_| ControlFlow::Continue(()))?;
/// assert_eq!(new.len(), 4);
/// // The vocabulary has 16 tokens.
/// assert!(generate(&model, &[16], &settings, |_| ControlFlow::Continue(())).is_err());
/// # Ok::<(), models::Error>(())
/// ```
pub fn generate(
    model: &Model,
    prompt: &[u32],
    settings: &Generation,
    mut on_token: impl FnMut(u32) -> ControlFlow<()>,
) -> Result<Vec<u32>> {
    settings.check()?;
    let vocab_size = model.vocab_size();
    if let Some(&token) = prompt.iter().find(|&&token| token as usize >= vocab_size) {
        let token = token.into();
        return Err(peft::Error::Token { token, vocab_size }.into());
    }
    let device = model.device();
    let tokens = |ids: &[u32]| {
        let ids: Vec<i64> = ids.iter().map(|&id| id.into()).collect();
        let shape = [1, ids.len()];
        Tensor::<2, Int>::from_data(TensorData::new(ids, shape), &device)
    };
    if prompt.is_empty() {
        return Err(GenerationError::NoTokens.into());
    }
    let n_new = settings.max_new_tokens;
    // The last token is not read.
    let mut cache = model.cache(prompt.len().saturating_add(n_new.saturating_sub(1)))?;
    let mut rng = ChaCha8Rng::seed_from_u64(settings.seed);
    let mut read = tokens(prompt);
    let mut new = Vec::new();
    while new.len() < n_new {
        let logits = model.forward_cached(read, &mut cache)?;
        let logits = logits.into_data().convert::<f32>();
        let logits = logits.as_slice::<f32>().expect("converted to f32");
        if logits.iter().any(|logit| !logit.is_finite()) {
            let position = cache.len();
            return Err(GenerationError::NonFiniteLogits { position }.into());
        }
        let token = settings.next(logits, &mut rng);
        new.push(token);
        if on_token(token).is_break() || settings.stop.contains(&token) {
            break;
        }
        read = tokens(&[token]);
    }
    Ok(new)
}

/// The index of the largest logit, the first if several are equal.
fn largest(logits: &[f32]) -> u32 {
    let mut largest = (0, f32::NEG_INFINITY);
    for (token, &logit) in (0..).zip(logits) {
        if logit > largest.1 {
            largest = (token, logit);
        }
    }
    largest.0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Error;

    /// Logarithms of 8, 4, 2, 1, 1 sixteenths, out of order.
    fn logits() -> [f32; 5] {
        [2.0f32, 8.0, 1.0, 4.0, 1.0].map(f32::ln)
    }

    fn kept(settings: &Generation) -> Vec<(u32, f64)> {
        let kept = settings.probabilities(&logits());
        let round = |p: f64| (p * 1e6).round() / 1e6;
        kept.into_iter()
            .map(|(token, p)| (token, round(p)))
            .collect()
    }

    #[test]
    fn top_k_and_top_p_leave_the_likeliest() {
        let all = Generation::new(1).with_temperature(1.0);
        assert_eq!(
            kept(&all),
            [(1, 0.5), (3, 0.25), (0, 0.125), (2, 0.0625), (4, 0.0625)]
        );
        let two = all.clone().with_top_k(2);
        assert_eq!(kept(&two), [(1, 0.666667), (3, 0.333333)]);
        // Both of those that are equally likely.
        assert_eq!(kept(&all.clone().with_top_k(4)).len(), 5);
        assert_eq!(kept(&all.clone().with_top_k(9)).len(), 5);
        // The fewest that reach it, and the one that crosses it.
        assert_eq!(kept(&all.clone().with_top_p(0.5)), [(1, 0.5)]);
        assert_eq!(kept(&all.clone().with_top_p(0.51)), [(1, 0.5), (3, 0.25)]);
        assert_eq!(kept(&all.clone().with_top_p(1e-9)), [(1, 0.5)]);
        // Of what top_k has left.
        assert_eq!(kept(&two.clone().with_top_p(0.6)), [(1, 0.666667)]);
        // Squares of the probabilities.
        let cold = all.clone().with_temperature(0.5);
        assert_eq!(kept(&cold)[..2], [(1, 0.744186), (3, 0.186047)]);
    }

    #[test]
    fn draws_are_as_likely_as_they_should_be() {
        let settings = Generation::new(1).with_temperature(1.0).with_top_k(3);
        let mut rng = ChaCha8Rng::seed_from_u64(5);
        let mut counts = [0usize; 5];
        for _ in 0..14_000 {
            counts[settings.next(&logits(), &mut rng) as usize] += 1;
        }
        assert_eq!((counts[2], counts[4]), (0, 0));
        // 2, 8 and 4 of 14 thousand, five deviations at most.
        for (count, expected) in [(counts[0], 2e3f64), (counts[1], 8e3), (counts[3], 4e3)] {
            let deviation = (expected * (1.0 - expected / 14e3)).sqrt();
            assert!(
                (count as f64 - expected).abs() < 5.0 * deviation,
                "{counts:?}"
            );
        }
        let greedy = Generation::new(1);
        assert_eq!(greedy.next(&logits(), &mut rng), 1);
        assert_eq!(greedy.next(&[3.0, 3.0], &mut rng), 0);
    }

    #[test]
    fn the_last_stop_tokens_hold() {
        let settings = Generation::new(1).with_stop([1, 2]).with_stop([3]);
        assert_eq!(settings.stop(), [3]);
    }

    #[test]
    fn settings_out_of_range_are_refused() {
        let good = Generation::new(3);
        assert!(good.check().is_ok());
        for bad in [
            good.clone().with_temperature(-1.0),
            good.clone().with_temperature(f64::NAN),
            good.clone().with_temperature(f64::INFINITY),
            good.clone().with_top_k(0),
            good.clone().with_top_p(0.0),
            good.clone().with_top_p(1.1),
            good.clone().with_top_p(f64::NAN),
        ] {
            let error = bad.check().unwrap_err();
            let named = matches!(error, Error::Peft(peft::Error::Setting { .. }));
            assert!(named, "{error}");
        }
    }
}
