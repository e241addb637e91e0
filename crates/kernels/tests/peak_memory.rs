//! A training step over packed weights keeps no dense weight alive.

mod counting;

use burn::tensor::{DType, Device, Distribution, Int, Tensor, TensorData};
use kernels::{Layout, Levels, pack, quant_matmul};

const WIDTH: usize = 512;
const LAYERS: usize = 8;
const ROWS: usize = 64;

#[test]
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
    step(); // The thread pool and its buffers come to stay.

    let above = counting::peak_of(step);
    let dense = LAYERS * WIDTH * WIDTH * size_of::<f32>();
    assert!(
        above < dense / 2,
        "{above} bytes above the packed model, {dense} bytes of dense weights"
    );
}
