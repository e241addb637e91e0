//! The loss, which is not public. What is public is tested in `tests/quant_core/optq.rs`.

use burn::tensor::{Device, Distribution};

use super::*;
use crate::values::floats;

/// A weight, and the Gram matrix of correlated inputs.
fn layer(d_in: usize, d_out: usize) -> (Tensor<2>, Gram) {
    let device = Device::flex();
    device.seed(7);
    let normal = Distribution::Normal(0.0, 1.0);
    let weight = Tensor::<2>::random([d_in, d_out], normal, &device);
    let mix = Tensor::<2>::random([d_in, d_in], normal, &device) / (d_in as f32).sqrt();
    let x = Tensor::<2>::random([3 * d_in, d_in], normal, &device);
    let mut gram = Gram::new(d_in, &device);
    gram.update(x.clone() + x.matmul(mix));
    (weight, gram)
}

fn round(optq: &Optq, weight: &Tensor<2>, gram: &Gram) -> Rounded {
    let layout = optq.format().unwrap().layout(weight.dims()).unwrap();
    kernels::with_values(weight.clone(), |w| optq.round(w, gram, &layout)).unwrap()
}

/// `Σ loss = ½ tr(D H D)` with the damped Hessian.
#[test]
fn the_losses_are_the_error_of_the_output() {
    let (weight, gram) = layer(300, 40);
    for order in [Order::Natural, Order::Descending, Order::DescendingByGroup] {
        let optq = Optq::new().with_bits(3).with_order(order);
        let loss = round(&optq, &weight, &gram).loss;
        let quantized = optq.quantize(weight.clone(), Some(&gram)).unwrap();
        let doubles = |values: Vec<f32>| values.into_iter().map(f64::from).collect::<Vec<_>>();
        let d = doubles(floats(quantized.weight.dequantize() - weight.clone()));
        let h = doubles(floats(gram.sum()));
        let mean = (0..300).map(|i| h[i * 300 + i]).sum::<f64>() / 300.0;
        let mut expected = 0.01 * mean * d.iter().map(|d| d * d).sum::<f64>();
        for o in 0..40 {
            for i in 0..300 {
                let row = &h[i * 300..][..300];
                let product: f64 = row.iter().enumerate().map(|(k, h)| h * d[k * 40 + o]).sum();
                expected += d[i * 40 + o] * product;
            }
        }
        assert!(
            (2.0 * loss / expected - 1.0).abs() < 1e-5,
            "{order:?}: {loss}, not half of {expected}"
        );
    }
}

#[test]
fn the_number_of_threads_changes_no_bit() {
    let (weight, gram) = layer(200, 150);
    let optq = Optq::new().with_group_size(64);
    for order in [Order::Descending, Order::DescendingRegrouped] {
        let optq = optq.with_order(order);
        let on = |n_threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(n_threads);
            let pool = pool.build().unwrap();
            pool.install(|| round(&optq, &weight, &gram))
        };
        let (one, three) = (on(1), on(3));
        assert!(one.codes == three.codes && one.grids.scales == three.grids.scales);
        assert_eq!(one.loss, three.loss);
    }
}
