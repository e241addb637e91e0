//! The distortion of quantized weights.

use burn::tensor::{Device, Distribution, Tensor};
use quant_core::{GroupRange, NormalFloat, Quantizer, Rtn};

/// The relative errors of a normal distribution, measured by independent code, within 1 %.
#[test]
fn gaussian_weights_have_the_known_errors() {
    let device = Device::flex();
    device.seed(11);
    let weight = Tensor::<2>::random([4096, 512], Distribution::Normal(0.0, 1.0), &device);
    let rows = [
        (Some(32), false, [0.4063, 0.1731, 0.0808, 0.00475]),
        (Some(64), false, [0.4571, 0.1952, 0.0911, 0.00536]),
        (Some(128), false, [0.5032, 0.2155, 0.1006, 0.00592]),
        (None, false, [0.6826, 0.2995, 0.1398, 0.00822]),
        (Some(64), true, [0.5109, 0.2203, 0.1028, 0.00605]),
        (Some(128), true, [0.5496, 0.2373, 0.1108, 0.00652]),
        (None, true, [0.7096, 0.3145, 0.1468, 0.00864]),
    ];
    for (group_size, symmetric, errors) in rows {
        for (bits, expected) in [2, 3, 4, 8].into_iter().zip(errors) {
            let rtn = Rtn::new()
                .with_bits(bits)
                .with_group_size(group_size)
                .with_symmetric(symmetric);
            check_error(&rtn, &weight, expected);
        }
    }
    for (group_size, errors) in [
        (Some(32), [0.3928, 0.1677, 0.0782, 0.00460]),
        (Some(64), [0.4502, 0.1924, 0.0897, 0.00528]),
        (Some(128), [0.5008, 0.2140, 0.0998, 0.00587]),
        // A channel's range has 0 near its middle, and a level there is worth more than the ends.
        (None, [0.7113, 0.2995, 0.1397, 0.00822]),
    ] {
        for (bits, expected) in [2, 3, 4, 8].into_iter().zip(errors) {
            let rtn = Rtn::new().with_bits(bits).with_group_size(group_size);
            check_error(&rtn.with_fractional_zeros(true), &weight, expected);
        }
    }
    let clipped = [
        (Some(64), [0.3566, 0.1769, 0.0874]),
        (Some(128), [0.3705, 0.1875, 0.0952]),
        (None, [0.3882, 0.2027, 0.1097]),
    ];
    for (group_size, errors) in clipped {
        for (bits, expected) in [2, 3, 4].into_iter().zip(errors) {
            let rtn = Rtn::new().with_bits(bits).with_group_size(group_size);
            check_error(&rtn.with_range(GroupRange::Clipped), &weight, expected);
        }
    }
    for (by_bits, errors) in [
        (false, [0.5628, 0.2016, 0.09196]),
        (true, [0.5643, 0.1974, 0.09196]),
    ] {
        for (bits, expected) in [2, 3, 4].into_iter().zip(errors) {
            let nf = NormalFloat::new()
                .with_bits(bits)
                .with_offset_by_bits(by_bits);
            check_error(&nf, &weight, expected);
        }
    }
}

fn check_error(method: &dyn Quantizer, weight: &Tensor<2>, expected: f64) {
    let packed = method.quantize(weight.clone(), None).unwrap().weight;
    let found = packed.distortion(weight.clone()).relative;
    let off = (found / expected - 1.0).abs();
    assert!(off < 0.01, "{}: {found}, not {expected}", packed.format());
}

#[test]
fn squares_are_summed_in_double_precision() {
    let n = (1 << 16) + 77;
    let values = Tensor::<1>::full([n], 0.1f32, &Device::flex());
    let expected = n as f64 * f64::from(0.1f32).powi(2);
    let found = quant_core::sum_of_squares(values);
    assert!(
        (found - expected).abs() < 1e-12 * expected,
        "{found} {expected}"
    );
}
