use burn::tensor::{Device, Int, Tensor, TensorData};
use peft::{CausalLm, Spans};

use crate::rolling::ScoredWindow;
use crate::{Error, Result};

/// The tokens of a batch: enough for efficient products, with activations small beside the weights.
const TOKENS: usize = 2048;

/// Evaluates the losses of the scored tokens of each window, in nats.
///
/// Windows of different lengths share batches: shorter ones are padded at the end, which attention does
/// not reach.
///
/// # Errors
/// [`Error::NoContext`] for a window whose scored tokens are not in it, or begin at its first token;
/// [`peft::Error::Token`] for a token that the model lacks; [`peft::Error::TooLong`] for a window beyond
/// the positions of the model; [`Error::NonFinite`] with the first window whose losses are not finite.
pub fn score<M: CausalLm>(
    model: &M,
    windows: &[ScoredWindow],
    device: &Device,
) -> Result<Vec<Vec<f64>>> {
    for window in windows {
        check(model, &window.tokens)?;
        let (scored, n_tokens) = (&window.scored, window.tokens.len());
        if scored.start == 0 || scored.start > scored.end || scored.end > n_tokens {
            return Err(Error::NoContext);
        }
    }
    let mut order: Vec<usize> = (0..windows.len()).collect();
    order.sort_by_key(|&at| std::cmp::Reverse(windows[at].tokens.len()));
    let mut losses = vec![Vec::new(); windows.len()];
    let mut rest = order.as_slice();
    while let Some(&longest) = rest.first() {
        let n_read = windows[longest].tokens.len() - 1;
        let n = (TOKENS / n_read.max(1)).clamp(1, rest.len());
        let (batch, others) = rest.split_at(n);
        rest = others;
        if n_read == 0 {
            continue;
        }
        let tokens = |from: usize| {
            let row = |&at: &usize| {
                let tokens = &windows[at].tokens;
                let row = tokens[from..tokens.len() + from - 1].iter();
                let row = row.map(|&token| i64::from(token));
                row.chain(std::iter::repeat(0)).take(n_read)
            };
            let values: Vec<i64> = batch.iter().flat_map(row).collect();
            let values = TensorData::new(values, [n, n_read]);
            Tensor::<2, Int>::from_data(values, device)
        };
        let found = token_losses(model, tokens(0), tokens(1));
        for (&at, found) in batch.iter().zip(found.chunks_exact(n_read)) {
            let found = &found[windows[at].losses()];
            if found.iter().any(|loss| !loss.is_finite()) {
                return Err(Error::NonFinite { window: at });
            }
            losses[at] = found.iter().map(|&loss| f64::from(loss)).collect();
        }
    }
    Ok(losses)
}

/// The loss of each target after the tokens that precede it, row by row.
fn token_losses<M: CausalLm>(model: &M, read: Tensor<2, Int>, targets: Tensor<2, Int>) -> Vec<f32> {
    let [n, seq] = read.dims();
    let positions = model.positions(&Spans::whole(seq, &read.device()));
    let x = model.embed(read, &positions);
    let x = (0..model.n_blocks()).fold(x, |x, block| model.block(block, x, &positions));
    let x = model.norm(x);
    let width = x.dims()[2];
    let x = x.reshape([n * seq, width]);
    let losses = model.head().nll(x, targets.reshape([n * seq]));
    let losses = losses.into_data().convert::<f32>().try_into_vec();
    losses.expect("converted to f32")
}

/// Checks that a model has the tokens of a window, and positions for those that it reads.
fn check<M: CausalLm>(model: &M, tokens: &[u32]) -> Result<()> {
    let vocab_size = model.vocab_size();
    if let Some(&token) = tokens.iter().find(|&&token| token as usize >= vocab_size) {
        let token = token.into();
        return Err(peft::Error::Token { token, vocab_size }.into());
    }
    let len = tokens.len().saturating_sub(1);
    match model.max_positions().filter(|&max| len > max) {
        Some(max) => Err(peft::Error::TooLong { len, max }.into()),
        None => Ok(()),
    }
}
