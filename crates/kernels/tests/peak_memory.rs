//! A training step keeps no dense weight, no logits and no attention scores alive.

mod counting;

use burn::tensor::{DType, Device, Distribution, Int, Tensor, TensorData};
use kernels::{
    Layout, Levels, Mask, OutputHead, Precision, Scores, attention, linear_cross_entropy, matmul,
    pack, quant_matmul,
};

/// The peak of allocated bytes during a second run of `step`, above those before it.
fn peak_of(step: impl Fn()) -> usize {
    step(); // The thread pool and its buffers are allocated once.
    counting::peak_of(step)
}

/// A single test, because the allocator counts the allocations of all threads.
#[test]
fn peaks_are_bounded() {
    one_step_stays_below_half_of_the_dense_weights();
    a_loss_keeps_one_slab_of_logits();
    attention_keeps_no_scores();
    a_weight_of_16_bits_is_never_whole_in_f32();
}

const WIDTH: usize = 512;
const LAYERS: usize = 8;
const ROWS: usize = 64;

fn one_step_stays_below_half_of_the_dense_weights() {
    let device = Device::flex().autodiff();
    let layout = Layout::new(WIDTH, WIDTH, 4, 64, Levels::Unsigned);
    let codes: Vec<u8> = (0..WIDTH * WIDTH)
        .map(|i| (i * i % 251 % 16) as u8)
        .collect();
    let words = TensorData::new(pack(&codes, &layout), layout.words_shape());
    drop(codes);
    let grid = |value: f32| Tensor::<2>::full(layout.grid_shape(), value, &device);
    let weights: Vec<_> = (0..LAYERS)
        .map(|_| {
            let words = Tensor::<3, Int>::from_data(words.clone(), (&device, DType::U32));
            (words, grid(0.01).require_grad(), grid(7.5))
        })
        .collect();
    let x = Tensor::<2>::random([ROWS, WIDTH], Distribution::Uniform(-1.0, 1.0), &device);

    let step = || {
        let mut y = x.clone();
        for (words, scales, zeros) in &weights {
            y = quant_matmul(
                y,
                words.clone(),
                scales.clone(),
                Some(zeros.clone()),
                layout,
                Precision::Full,
            );
        }
        let grads = y.sum().backward();
        for (_, scales, _) in &weights {
            let sum = scales
                .grad(&grads)
                .unwrap()
                .abs()
                .sum()
                .into_scalar::<f32>();
            assert!(sum.is_finite() && sum > 0.0);
        }
    };
    let above = peak_of(step);
    let dense = LAYERS * WIDTH * WIDTH * size_of::<f32>();
    assert!(
        above < dense / 2,
        "{above} bytes above the packed model, {dense} bytes of dense weights"
    );
}

/// The logits of the whole batch are 96 MB.
fn a_loss_keeps_one_slab_of_logits() {
    let device = Device::flex().autodiff();
    let uniform = Distribution::Uniform(-1.0, 1.0);
    let x = Tensor::<2>::random([600, 32], uniform, &device).require_grad();
    let embedding = Tensor::<2>::random([40_000, 32], uniform, &device).require_grad();
    let bias = Tensor::<1>::random([40_000], uniform, &device).require_grad();
    let targets = Tensor::<1, Int>::arange(0..600, &device);
    for capped in [false, true] {
        let above = peak_of(|| {
            let head = OutputHead::new(embedding.clone().transpose());
            let head = match capped {
                true => head.with_bias(bias.clone()).with_softcap(2.0),
                false => head,
            };
            let nll = linear_cross_entropy(x.clone(), head, targets.clone());
            let grads = nll.sum().backward();
            assert!(x.grad(&grads).is_some() && embedding.grad(&grads).is_some());
            assert_eq!(bias.grad(&grads).is_some(), capped);
        });
        let gradients = (600 + 40_000) * 32 * size_of::<f32>();
        assert!(
            above < (17 << 20) + 2 * gradients,
            "{above} bytes above the parameters"
        );
    }
}

/// The scores of all heads are 64 MiB.
fn attention_keeps_no_scores() {
    let device = Device::flex().autodiff();
    let [q, k, v] = [(); 3].map(|()| {
        let uniform = Distribution::Uniform(-1.0, 1.0);
        Tensor::<4>::random([1, 2048, 4, 8], uniform, &device).require_grad()
    });
    let plain = Scores::new(0.5);
    for (mask, scores) in [
        (Mask::causal(), plain),
        (Mask::causal(), plain.with_softcap(1.0)),
        (Mask::full(), plain),
    ] {
        let above = peak_of(|| {
            let y = attention(q.clone(), k.clone(), v.clone(), mask.clone(), scores);
            let grads = y.sum().backward();
            assert!([&q, &k, &v].iter().all(|t| t.grad(&grads).is_some()));
        });
        let values = 2048 * 4 * 8 * size_of::<f32>();
        assert!(
            above < 12 * values,
            "{above} bytes beside {values} of values"
        );
    }
}

/// A product widens a panel of 4 MiB or of 256 columns at a time, and the loss one of 16 MiB of the head.
fn a_weight_of_16_bits_is_never_whole_in_f32() {
    let device = Device::flex().autodiff();
    let random =
        |dims: [usize; 2]| Tensor::<2>::random(dims, Distribution::Uniform(-1.0, 1.0), &device);
    let whole = 4 * 1024 * 8192;
    let weight = random([1024, 8192]).cast(DType::BF16);
    for weight in [weight.clone(), weight.transpose()] {
        let [d_in, d_out] = weight.dims();
        for rows in [1, 16] {
            let x = random([rows, d_in]).require_grad();
            let peak = peak_of(|| {
                let y = matmul(x.clone(), weight.clone());
                drop(x.grad(&y.sum().backward()));
            });
            let results = 4 * rows * (4 * d_in + 6 * d_out);
            assert!(
                peak < whole / 4 + results + (2 << 20),
                "{peak} bytes, the weight has {whole}"
            );
        }
    }
    let head = random([1024, 16384]).cast(DType::BF16);
    let x = random([8, 1024]).require_grad();
    let targets = Tensor::<1, Int>::zeros([8], &device);
    let peak = peak_of(|| {
        let losses = linear_cross_entropy(x.clone(), head.clone(), targets.clone());
        drop(x.grad(&losses.sum().backward()));
    });
    let (logits, head) = (4 * 8 * 16384, 4 * 1024 * 16384);
    assert!(
        peak < head / 4 + 3 * logits + (1 << 20),
        "{peak} bytes, the head has {head}"
    );
}
