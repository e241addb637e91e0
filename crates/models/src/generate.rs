//! A text token by token: what was computed for the tokens before stays in a cache.

use burn::tensor::{Int, Tensor, TensorData};
use peft::{CausalLm, Spans};

use crate::positions::Positions;
use crate::{Config, Error, Model, Result, RopeScaling};

/// The keys and values of the tokens that a [`Model`] has read, made by [`Model::cache`].
///
/// Its memory grows with the text, to twice the size at a time; between that, a token is written in
/// its place and nothing is copied.
#[derive(Clone, Debug)]
pub struct Cache {
    blocks: Vec<Past>,
    /// Of `capacity` positions; none before the first token.
    positions: Option<Positions>,
    capacity: usize,
    len: usize,
    max_len: usize,
}

impl Cache {
    /// Tokens read.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether no token has been read.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Tokens that it takes at most.
    pub fn max_len(&self) -> usize {
        self.max_len
    }
}

/// The keys and values of one block.
#[derive(Clone, Debug, Default)]
pub(crate) struct Past {
    keys: Option<Tensor<4>>,
    values: Option<Tensor<4>>,
    /// Tokens whose keys and values are there.
    len: usize,
    /// Tokens to make room for.
    capacity: usize,
}

impl Past {
    /// The keys and values of all tokens, these being the last; `[batch, seq, kv_heads, head_dim]`.
    pub(crate) fn append(&mut self, keys: Tensor<4>, values: Tensor<4>) -> (Tensor<4>, Tensor<4>) {
        let seq = keys.dims()[1];
        let (start, capacity) = (self.len, self.capacity);
        let append = |room: &mut Option<Tensor<4>>, new: Tensor<4>| {
            let [batch, _, heads, dim] = new.dims();
            let empty = || {
                let place = (&new.device(), new.dtype());
                Tensor::zeros([batch, capacity, heads, dim], place)
            };
            let old = match room.take() {
                Some(old) if old.dims()[1] == capacity => old,
                Some(old) => {
                    let old = old.narrow(1, 0, start);
                    empty().slice_assign([0..batch, 0..start], old)
                }
                None => empty(),
            };
            // In place: no one else has a handle on it by now.
            let all = old.slice_assign([0..batch, start..start + seq], new);
            let read = all.clone().narrow(1, 0, start + seq);
            *room = Some(all);
            read
        };
        let keys = append(&mut self.keys, keys);
        let values = append(&mut self.values, values);
        self.len += seq;
        (keys, values)
    }
}

impl Model {
    /// An empty cache for texts of up to `max_len` tokens. They may be more than a model with rotary
    /// embeddings was made for, as transformers has it.
    ///
    /// # Errors
    /// [`peft::Error::TooLong`] for more than [`CausalLm::max_positions`];
    /// [`Error::DynamicRope`] for a `dynamic` rope scaling that `max_len` would bring into effect: it
    /// turns all tokens anew for each length, and a cache holds them as they were turned.
    pub fn cache(&self, max_len: usize) -> Result<Cache> {
        if let Some(max) = self.max_positions().filter(|&max| max_len > max) {
            return Err(peft::Error::TooLong { len: max_len, max }.into());
        }
        if let Config::Llama(config) = self.config() {
            let max = config.max_position_embeddings;
            if matches!(config.rope_scaling, RopeScaling::Dynamic { .. }) && max_len > max {
                return Err(Error::DynamicRope { max_len, max });
            }
        }
        Ok(Cache {
            blocks: vec![Past::default(); self.n_blocks()],
            positions: None,
            capacity: 0,
            len: 0,
            max_len,
        })
    }

    /// The logits of the token after the last of `tokens`, which come after those in the cache and
    /// join them: a prompt at once, and then one token at a time.
    ///
    /// # Shapes
    /// - `tokens`: `[batch, seq]`
    /// - result: `[batch, vocab]`
    ///
    /// # Errors
    /// [`Error::NoTokens`], or [`Error::CacheFull`] if there are more than it takes. Then the cache
    /// is as it was.
    ///
    /// # Panics
    /// If a token is not in the vocabulary, or the cache is that of a model of another shape or of
    /// another number of texts.
    pub fn forward_cached(&self, tokens: Tensor<2, Int>, cache: &mut Cache) -> Result<Tensor<2>> {
        let [batch, seq] = tokens.dims();
        if batch * seq == 0 {
            return Err(Error::NoTokens);
        }
        let (start, max_len) = (cache.len, cache.max_len);
        let len = start + seq;
        if len > max_len {
            return Err(Error::CacheFull { len, max_len });
        }
        assert_eq!(cache.blocks.len(), self.n_blocks(), "blocks of the cache");
        if len > cache.capacity || cache.positions.is_none() {
            cache.capacity = len.max(2 * cache.capacity).max(64).min(max_len);
            // Of a length for which no scaling depends on it.
            let spans = Spans::whole(cache.capacity, &tokens.device());
            cache.positions = Some(self.positions(&spans));
        }
        let positions = cache.positions.as_ref().expect("made above");
        let positions = positions.narrow(start, seq);
        let logits = kernels::among_threads(&tokens.device(), || {
            let mut x = self.embed(tokens, &positions);
            for (block, past) in self.blocks().iter().zip(&mut cache.blocks) {
                past.capacity = cache.capacity;
                x = block.forward(x, &positions, Some(past));
            }
            let x = self.norm(x.narrow(1, seq - 1, 1)).squeeze_dim::<2>(1);
            self.logits(x)
        });
        cache.len = len;
        Ok(logits)
    }
}

/// Continues `prompt` by up to `n_new` tokens, each the one with the largest logit, the first of
/// them where several have it. Ends after the token `stop`, which is part of the result. `on_token`
/// sees each token as it comes.
///
/// # Errors
/// [`Error::NoTokens`] for an empty prompt, [`peft::Error::Token`] for a token that the model lacks,
/// [`Error::DynamicRope`] as [`Model::cache`], or [`Error::NonFiniteLogits`].
pub fn greedy(
    model: &Model,
    prompt: &[u32],
    n_new: usize,
    stop: Option<u32>,
    mut on_token: impl FnMut(u32),
) -> Result<Vec<u32>> {
    let vocab_size = model.vocab_size();
    if let Some(&token) = prompt.iter().find(|&&token| token as usize >= vocab_size) {
        let token = token.into();
        return Err(peft::Error::Token { token, vocab_size }.into());
    }
    let device = model.embed_tokens.val().device();
    let tokens = |ids: &[u32]| {
        let ids: Vec<i64> = ids.iter().map(|&id| id.into()).collect();
        let shape = [1, ids.len()];
        Tensor::<2, Int>::from_data(TensorData::new(ids, shape), &device)
    };
    if prompt.is_empty() {
        return Err(Error::NoTokens);
    }
    // The last token is not read.
    let mut cache = model.cache(prompt.len().saturating_add(n_new.saturating_sub(1)))?;
    let mut read = tokens(prompt);
    let mut new = Vec::new();
    while new.len() < n_new {
        let logits = model.forward_cached(read, &mut cache)?;
        let token = largest(logits).ok_or(Error::NonFiniteLogits {
            position: cache.len(),
        })?;
        new.push(token);
        on_token(token);
        if stop == Some(token) {
            break;
        }
        read = tokens(&[token]);
    }
    Ok(new)
}

/// The place of the largest of these logits, `[1, vocab]`, if all are finite.
fn largest(logits: Tensor<2>) -> Option<u32> {
    let logits = logits.into_data().convert::<f32>();
    let logits = logits.as_slice::<f32>().expect("converted to f32");
    let mut largest = (0, f32::NEG_INFINITY);
    for (token, &logit) in (0..).zip(logits) {
        if !logit.is_finite() {
            return None;
        }
        if logit > largest.1 {
            largest = (token, logit);
        }
    }
    Some(largest.0)
}
