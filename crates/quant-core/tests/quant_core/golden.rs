//! Comparison with files that reference implementations wrote: see `tests/golden/README.md`.

use std::path::Path;

use burn::tensor::{Device, Tensor};
use quant_core::{
    DoubleQuant, DoubleScales, Gram, NormalFloat, Optq, Order, Parts, QuantTensor, Quantized,
    Quantizer, Scales,
};
use safetensors::SafeTensors;

use crate::cases::{tensor, values};

/// A file of tensors.
struct File(Vec<u8>);

impl File {
    /// A file of this repository.
    fn part(name: &str) -> Self {
        Self::open("tests/golden", name)
    }

    /// The whole file, which the one of this repository is a part of.
    fn whole(name: &str) -> Self {
        Self::open("../../../shared/golden", name)
    }

    fn open(directory: &str, name: &str) -> Self {
        let here = Path::new(env!("CARGO_MANIFEST_DIR"));
        let path = here.join(directory).join(name);
        Self(std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display())))
    }

    fn bytes<const N: usize>(&self, name: &str) -> (Vec<[u8; N]>, Vec<usize>) {
        let tensors = SafeTensors::deserialize(&self.0).unwrap();
        let tensor = tensors.tensor(name).unwrap_or_else(|_| panic!("{name}"));
        let (chunks, _) = tensor.data().as_chunks::<N>();
        (chunks.to_vec(), tensor.shape().to_vec())
    }

    fn has(&self, name: &str) -> bool {
        let tensors = SafeTensors::deserialize(&self.0).unwrap();
        tensors.tensor(name).is_ok()
    }

    fn floats(&self, name: &str) -> Vec<f32> {
        let (values, _) = self.bytes(name);
        values.into_iter().map(f32::from_le_bytes).collect()
    }

    fn words(&self, name: &str) -> Vec<u32> {
        let (words, _) = self.bytes(name);
        words.into_iter().map(u32::from_le_bytes).collect()
    }

    /// A matrix `[out, in]` as `[in, out]`.
    fn transposed(&self, name: &str) -> Tensor<2> {
        let (_, shape) = self.bytes::<4>(name);
        tensor(self.floats(name), [shape[0], shape[1]]).transpose()
    }
}

/// The settings of each case for the reference, with its error `tr((W - Q) H (W - Q)ᵀ)`.
fn gptq_cases() -> Vec<(&'static str, Optq, f64)> {
    let optq = Optq::new().with_order(Order::Natural);
    let group = optq.with_group_size(32);
    vec![
        ("w2_g32_asym", group.with_bits(2), 6.493297048735108),
        ("w3_g32_asym", group.with_bits(3), 0.9741695892323374),
        ("w4_g32_asym", group, 0.20714134791375036),
        ("w8_g32_asym", group.with_bits(8), 0.0006782197798524301),
        ("w4_g32_sym", group.with_symmetric(true), 0.2840605813195183),
        (
            "w4_g128_asym",
            optq.with_group_size(128),
            0.3264438212009425,
        ),
        ("w4_perchannel", optq, 0.3264438212009425),
        (
            "w4_g32_descact",
            group.with_order(Order::DescendingRegrouped),
            0.1443395343061765,
        ),
        (
            "w4_g32_descact_static",
            group.with_order(Order::Descending),
            0.14627739822873922,
        ),
        (
            "w4_g32_actgroup",
            group
                .with_symmetric(true)
                .with_order(Order::DescendingByGroup),
            0.25873242634872506,
        ),
        ("w4_dead_column", group, 0.20492558180468828),
        ("w4_zero_point_0", group, 0.18971896259116147),
    ]
}

/// GPTQModel 7.7: codes, scales, zeros, groups and the error of the layer's output.
fn check_optq(file: &File) {
    for (case, optq, expected_error) in gptq_cases() {
        let name = |part: &str| format!("{case}.{part}");
        let own = |part: &str, shared: &str| {
            if file.has(&name(part)) {
                name(part)
            } else {
                shared.to_string()
            }
        };
        let weight = file.transposed(&own("weight", "weight"));
        let hessian = file.transposed(&own("hessian", "w4_g32_asym.hessian"));
        // The reference's Hessian is `2 G / n_tokens`.
        let gram = Gram::from_sum(hessian * 256.0, 512).unwrap();
        let Quantized {
            weight: packed,
            notes,
        } = optq.quantize(weight.clone(), Some(&gram)).unwrap();
        assert_eq!(
            notes.is_empty(),
            case != "w4_dead_column",
            "{case}: {notes:?}"
        );

        let [d_in, d_out] = packed.dims();
        let expected = codes(&file.words(&name("qweight")), packed.format().bits(), d_in);
        let found = packed.codes();
        // The lowest weight of a symmetric group is a tie between the codes 0 and 1, which the
        // last bit of a sum decides; the rest of that column then differs from the reference.
        let pairs: Vec<_> = found.iter().zip(&expected).enumerate().collect();
        let tied = |o: usize| {
            let column = pairs.iter().filter(|(k, _)| k % d_out == o);
            let mut codes = column.map(|(_, (a, b))| (**a, **b));
            packed.zeros().is_none() && codes.any(|pair| pair == (0, 1) || pair == (1, 0))
        };
        let n_tied = (0..d_out).filter(|&o| tied(o)).count();
        assert!(n_tied <= 2, "{case}: {n_tied} columns with ties");
        let untied = |k: usize| n_tied == 0 || !tied(k % d_out);
        let rest: Vec<_> = pairs.iter().filter(|(k, _)| untied(*k)).collect();
        let equal = rest.iter().filter(|(_, (a, b))| a == b).count();
        let share = equal as f64 / rest.len() as f64;
        assert!(share >= 0.999, "{case}: {share} of the codes are equal");

        let g_idx = file.words(&name("g_idx"));
        assert_eq!(groups(&packed), g_idx, "{case}");
        let grids = [("scale", Some(packed.scales())), ("zero", packed.zeros())];
        for (part, found) in grids {
            let Some(found) = found else { continue };
            let expected = values(file.transposed(&name(part)));
            for (k, (found, expected)) in values(found).iter().zip(expected).enumerate() {
                if !untied(k) {
                    continue;
                }
                let off = (found - expected).abs();
                assert!(
                    off <= 2e-5 * expected.abs(),
                    "{case}: {part} {found}, not {expected}"
                );
            }
        }

        // The dead input's weight counts: its error is measured with the Hessian as it was.
        let error = gram.energy(packed.dequantize() - weight) / 256.0;
        let off = (error / expected_error - 1.0).abs();
        assert!(off < 1e-3, "{case}: error {error}, not {expected_error}");
        eprintln!(
            "{case}: {share:.5} of the codes, {n_tied} ties, error {error:.6} of {expected_error:.6}"
        );
        assert_eq!(d_out, 64);
    }
}

/// The codes in GPTQ's words, `[word_rows, 64]`.
fn codes(words: &[u32], bits: usize, d_in: usize) -> Vec<u8> {
    let code = |i: usize, o: usize| {
        let bit = i * bits;
        let low = u64::from(words[bit / 32 * 64 + o]);
        let high = words
            .get((bit / 32 + 1) * 64 + o)
            .map_or(0, |&word| u64::from(word));
        ((low | high << 32) >> (bit % 32)) as u8 & ((1u16 << bits) - 1) as u8
    };
    (0..d_in)
        .flat_map(|i| (0..64).map(move |o| code(i, o)))
        .collect()
}

/// The group of each input.
fn groups(packed: &QuantTensor) -> Vec<u32> {
    let layout = packed.layout();
    let group = |row: usize| (row / layout.group_size()) as u32;
    let mut groups: Vec<u32> = (0..layout.d_in()).map(group).collect();
    if let Some(order) = packed.input_order() {
        for (row, input) in order.into_iter().enumerate() {
            groups[input as usize] = group(row);
        }
    }
    groups
}

/// bitsandbytes 0.50.2: bytes, absmax, double-quantized absmax and weights, all bit for bit; the first
/// `n` cases.
fn check_codebooks(file: &File, n: usize) {
    let names = [
        "nf4_b64_dq_normal",
        "fp4_b64_dq_normal",
        "nf4_b128_flat_normal",
        "nf4_b64_flat_outliers",
        "nf4_b64_flat_zeros",
        "fp4_b64_flat_normal",
        "nf4_b128_dq_normal",
        "nf4_b256_dq_normal",
        "nf4_b256_flat_normal",
        "nf4_b64_dq_outliers",
        "nf4_b64_flat_normal",
    ];
    for case in &names[..n] {
        let name = |part: &str| format!("{case}.{part}");
        let mut parts = case.split('_');
        let method = match parts.next() {
            Some("nf4") => NormalFloat::new(),
            _ => NormalFloat::float4(),
        };
        let block = parts.next().unwrap()[1..].parse::<usize>().unwrap();
        let double = parts.next() == Some("dq");
        let method = method
            .with_block_size(block)
            .with_double_quant(double.then(DoubleQuant::dynamic));
        let weight = file.transposed(&name("weight"));
        let mut packed = method.quantize(weight, None).unwrap().weight;

        // `[in, out]` as `[out, in]`, two codes in a byte, the first one high.
        let (codes, [d_in, d_out]) = (packed.codes(), packed.dims());
        let by_output = |o: usize| (0..d_in).map(move |i| (i, o));
        let flat: Vec<u8> = (0..d_out)
            .flat_map(by_output)
            .map(|(i, o)| codes[i * d_out + o])
            .collect();
        let bytes: Vec<[u8; 1]> = flat.chunks(2).map(|c| [c[0] << 4 | c[1]]).collect();
        assert_eq!(bytes, file.bytes(&name("packed")).0, "{case}: codes");

        match packed.to_parts().scales {
            Scales::Float(_) => {
                let absmax = values(packed.scales().transpose());
                assert_eq!(absmax, file.floats(&name("absmax")), "{case}: absmax");
            }
            Scales::Double(found) => {
                // bitsandbytes' host code looks up levels in a table that is too coarse next to a
                // midpoint, which concerns one in some 200 scales, and sums the mean in f32.
                let expected = file.bytes::<1>(&name("absmax")).0;
                let off: Vec<_> = found.codes.iter().zip(&expected).collect();
                let off = off.iter().filter(|(a, [b])| *a != b);
                assert!(off.clone().count() <= 1, "{case}: codes of absmax");
                assert!(off.clone().all(|(a, [b])| a.abs_diff(*b) == 1), "{case}");
                let close = |a: f32, b: f32| (a - b).abs() <= 1e-6 * b.abs();
                let absmax = file.floats(&name("nested_absmax"));
                assert!(close(found.absmax[0], absmax[0]), "{case}: nested absmax");
                let offset = file.floats(&name("offset"))[0];
                assert!(close(found.offset, offset), "{case}: offset");

                let scales = Scales::Double(DoubleScales {
                    codes: expected.into_iter().flatten().collect(),
                    absmax,
                    offset,
                });
                let parts = Parts {
                    scales,
                    ..packed.to_parts()
                };
                let format = packed.format();
                packed =
                    QuantTensor::from_parts(parts, format, [d_in, d_out], &Device::flex()).unwrap();
            }
        }
        if file.has(&name("dequantized")) {
            let expected = values(file.transposed(&name("dequantized")));
            let found = values(packed.dequantize());
            assert!(found == expected, "{case}: weights");
        }
    }
}

#[test]
fn optq_is_the_references() {
    check_optq(&File::part("gptq.safetensors"));
}

#[test]
#[ignore = "needs ../shared"]
fn optq_is_the_references_in_all_cases() {
    check_optq(&File::whole("gptq/layers.safetensors"));
}

#[test]
fn codebooks_are_bitsandbytes() {
    check_codebooks(&File::part("nf4.safetensors"), 5);
}

#[test]
#[ignore = "needs ../shared"]
fn codebooks_are_bitsandbytes_in_all_cases() {
    check_codebooks(&File::whole("nf4/blocks.safetensors"), 11);
}
